"""How many connections a rank has once its groups are there: those that something has gone over, not one to each."""

from __future__ import annotations

import os
from pathlib import Path

from torch.distributed import ProcessGroupGloo, distributed_c10d

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import exchange
from tests.parallel.layouts import layout
from tests.parallel.ranks import run_ranks


def _sockets() -> int:
    open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return sum(name.startswith("socket:") for name in open_files)


def _connections(lazy: str) -> tuple[int, int]:
    """Sockets (of the groups, once an object was gathered over all ranks)."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = lazy
    distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # with a device for each group, as outside of tests
    before = _sockets()
    with layout(ParallelSection()) as ranks:
        of_groups = _sockets() - before
        exchange.all_gather_objects(ranks.rank, ranks.world)
        return of_groups, _sockets() - before


def test_groups_connect_when_something_is_sent() -> None:
    few, many = (max(of_groups for of_groups, _ in run_ranks(_connections, size, "1")) for size in (2, 8))
    assert many <= few + 1, "a rank's start costs as many connections in a world of eight as in one of two"


def test_without_it_each_rank_connects_to_each() -> None:
    few, many = (max(of_groups for of_groups, _ in run_ranks(_connections, size, "0")) for size in (2, 8))
    assert many - few >= 6
