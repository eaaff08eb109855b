"""How many connections a rank has once its groups are there: those that something has gone over, not one to each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.distributed import ProcessGroupGloo, distributed_c10d

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import exchange
from tests.parallel.layouts import layout
from tests.parallel.ranks import run_ranks


def _sockets() -> int:
    open_files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists()]
    return sum(name.startswith("socket:") for name in open_files)


def _all_have_come_to(place: str, num_ranks: int) -> None:
    """Wait for all ranks, through the store: a barrier of the group's would connect them."""
    store = distributed_c10d._get_default_store()
    if store.add(place, 1) == num_ranks:
        store.set(f"{place}, all", "")
    store.wait([f"{place}, all"])


@dataclass(frozen=True)
class _Counts:
    """Sockets more than before the groups were made, after each of these in turn."""

    groups: int
    gathered: int
    """An object was gathered over all ranks, which goes round in a ring."""
    sent: int
    """Something was sent to one rank that is no neighbour in the ring, and came from it."""
    sent_nothing: int
    """The same call in which nobody had anything for anybody."""
    all_to_all: int
    """Every rank had something for every other."""


def _connections(lazy: str) -> _Counts:
    os.environ["TORCH_GLOO_LAZY_INIT"] = lazy
    distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # with a device for each group, as outside of tests
    before = _sockets()
    counts = []
    with layout(ParallelSection()) as ranks:
        world, opposite = ranks.world, ranks.rank ^ ranks.world.size() // 2
        for number, what in enumerate(
            (
                lambda: None,
                lambda: exchange.all_gather_objects(ranks.rank, world),
                lambda: exchange.send_arrays({opposite: torch.zeros(9)}, [opposite], torch.float32, world),
                lambda: exchange.send_arrays({}, [], torch.float32, world),
                lambda: exchange.all_to_all_parts(torch.zeros(size := world.size()), [1] * size, [1] * size, world),
            )
        ):
            what()
            _all_have_come_to(f"{number}: done", world.size())
            counts.append(_sockets() - before)
            _all_have_come_to(f"{number}: counted", world.size())
    return _Counts(*counts)


@pytest.fixture(scope="module")
def lazy() -> tuple[list[_Counts], list[_Counts]]:
    """Of worlds of two ranks and of eight, by rank."""
    few, many = (run_ranks(_connections, size, "1") for size in (2, 8))
    return few, many


def test_groups_connect_when_something_is_sent(lazy: tuple[list[_Counts], list[_Counts]]) -> None:
    few, many = (max(counts.groups for counts in found) for found in lazy)
    assert many <= few + 1, "a rank's start costs as many connections in a world of eight as in one of two"


def test_only_ranks_that_have_something_for_one_another_connect(lazy: tuple[list[_Counts], list[_Counts]]) -> None:
    for counts in lazy[1]:
        assert counts.sent - counts.gathered == 1, "one connection to the one rank that something goes to"
        assert counts.sent_nothing == counts.sent
        # The control: of seven others, three are connected by then. A collective connects with the rest.
        assert counts.all_to_all - counts.sent == 4


def test_without_it_each_rank_connects_to_each() -> None:
    few, many = (max(counts.groups for counts in run_ranks(_connections, size, "0")) for size in (2, 8))
    assert many - few >= 6
