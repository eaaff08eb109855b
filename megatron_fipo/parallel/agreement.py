"""An error that one rank alone meets is raised on all ranks, so that none waits for one that has left."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.distributed import ProcessGroup

from megatron_fipo.parallel import exchange
from megatron_fipo.system.disk import DiskError

T = TypeVar("T")


def on_every_rank(action: Callable[[], T], world: ProcessGroup) -> T:
    """Do something at which one rank's disk or files may fail. Collective.

    Returns:
        What the action returned on this rank.

    Raises:
        DiskError, ValueError: on every rank, the first rank's of those that failed so.
    """
    failed: tuple[type[DiskError] | type[ValueError], str] | None = None
    results: list[T] = []
    try:
        results.append(action())
    except DiskError as error:
        failed = DiskError, str(error)
    except ValueError as error:
        failed = ValueError, str(error)
    for found in exchange.all_gather_objects(failed, world):
        if found:
            kind, message = found
            raise kind(message)
    return results[0]


def on_leader(action: Callable[[], T], world: ProcessGroup) -> T | None:
    """Do `on_every_rank` with an action that only rank 0 takes; other ranks get None. Collective."""
    return on_every_rank(action if world.rank() == 0 else lambda: None, world)


def decided_by_leader(
    action: Callable[[], T], world: ProcessGroup, errors: tuple[type[Exception], ...] = (DiskError, ValueError)
) -> T:
    """What rank 0 finds out or decides, on every rank. Collective; the others do not call `action`.

    Args:
        errors: what `action` may raise; it is raised on every rank then. Each is made of a message alone.
    """
    told: tuple[T | None, tuple[type[Exception], str] | None] | None = None
    if world.rank() == 0:
        try:
            told = action(), None
        except errors as error:
            told = None, (type(error), str(error))
    result, failed = exchange.broadcast_object(told, world)
    if failed:
        kind, message = failed
        raise kind(message)
    return result  # type: ignore[return-value] # None is what rank 0 found, then
