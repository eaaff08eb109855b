"""All gloo groups of a process through one device, so that idle groups cost nothing.

torch gives each group a device of its own, whose thread wakes a hundred times a second whether or not anything comes. A
rank has a dozen groups for each layout that it has been in: on a machine with fewer cores than ranks, those threads
take turns with the ones that compute. What travels, and in which order it is summed up, is the same.
"""

from __future__ import annotations

from datetime import timedelta
from functools import cache
from typing import Any

from torch.distributed import ProcessGroupGloo, distributed_c10d


@cache
def _device() -> Any:
    """Made in the rank itself: its thread would not survive a fork. Groups that connect late hang if they share one."""
    return ProcessGroupGloo.create_default_device(lazy_init=False)


class _OnOneDevice(ProcessGroupGloo):
    """What torch makes of "gloo"."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._devices = [_device()]
        options._timeout = timeout
        super().__init__(store, rank, size, options)


def install() -> None:
    """For all groups that this process and those forked from it make from now on."""
    distributed_c10d.ProcessGroupGloo = _OnOneDevice  # type: ignore[misc]
