"""Run a function on several ranks of a real torch.distributed world on this machine.

Every rank asserts for itself; the first failing rank's traceback is what the test shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_fipo.parallel.local_ranks import RankError, run_local_ranks

__all__ = ["RankError", "run_ranks"]


def run_ranks(target: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """`run_local_ranks`, forked from a process that has imported what the tests need."""
    return run_local_ranks(target, world_size, *args, preload=["tests.parallel.preload"], timeout_s=timeout_s)
