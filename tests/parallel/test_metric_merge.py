"""Metrics merged over ranks: the bits of one merge after the other, and bytes that do not grow with the ranks."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed import ProcessGroup, ProcessGroupGloo, distributed_c10d

from megatron_fipo.config import ParallelSection
from megatron_fipo.metrics.reductions import Histogram, Last, Max, Metrics, Sum, merge
from megatron_fipo.parallel import exchange, metric_merge
from megatron_fipo.parallel.flat_metrics import add_up, flatten, on_cpu
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.rl.objective_metrics import shift_histograms
from tests.parallel.layouts import layout
from tests.parallel.ranks import run_ranks
from tests.random_metrics import bits, metrics


def _by_objects(own: Metrics | None, group: ProcessGroup) -> Metrics:
    """What `merge_metrics` was: every rank receives everybody's metrics as an object, and adds up all of them."""
    shared = exchange.all_gather_objects(None if own is None else on_cpu(own), group)
    return merge([part for part in shared if part is not None])


# --- the same bits ---------------------------------------------------------------------------------------------------

ROUNDS: dict[str, tuple[float, float, bool]] = {
    "alike": (0.0, 0.0, False),
    "some ranks do not count": (0.5, 0.0, False),
    "names are missing": (0.0, 0.3, False),
    "in another order": (0.0, 0.0, True),
    "all of it": (0.3, 0.3, True),
}
"""Share of ranks whose metrics do not count, share of names that a rank does not have, whether it shuffles them."""


def _own(random: Random, share_absent: float, share_missing: float, shuffled: bool) -> Metrics | None:
    if random.random() < share_absent:
        return random.choice([None, {}])
    return metrics(random, 20, share_missing, shuffled)


def _in_another_order(parts: Any) -> Metrics:
    return add_up(parts[::-1])


def _same_bits(repeats: int) -> dict[str, Any]:
    """(by round: bits of the sum, bits of the reference; the sum where the adding rank goes by another order)"""
    found: dict[str, Any] = {name: [] for name in ROUNDS}
    with layout(ParallelSection()) as ranks:
        for name, shares in ROUNDS.items():
            for repeat in range(repeats):
                own = _own(Random(f"{name} {repeat} {ranks.rank}"), *shares)
                found[name].append((bits(merge_metrics(own, ranks.world)), bits(_by_objects(own, ranks.world))))
        assert merge_metrics(None, ranks.world) == {}
        own = {"sum": Sum(0.1 * 10**ranks.rank), **metrics(Random(ranks.rank))}
        with mock.patch.object(metric_merge, "add_up", _in_another_order):
            found["broken"] = bits(merge_metrics(own, ranks.world)), bits(_by_objects(own, ranks.world))
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_the_sum_has_the_bits_of_one_merge_after_the_other(world_size: int) -> None:
    of_ranks = run_ranks(_same_bits, world_size, 6)
    for name in ROUNDS:
        for rank, found in enumerate(of_ranks):
            assert all(ours == theirs for ours, theirs in found[name]), f"{name}, rank {rank}"
        assert all(found[name] == of_ranks[0][name] for found in of_ranks), f"{name}: ranks differ"
    for found in of_ranks:
        ours, theirs = found["broken"]
        assert ours != theirs, "another order of the ranks was not noticed"


# --- what cannot be merged -------------------------------------------------------------------------------------------


def _refused() -> list[tuple[str, str]]:
    """Type and message of what each case raises on this rank."""
    edges = torch.arange(4.0, dtype=torch.float64)
    found = []
    with layout(ParallelSection()) as ranks:
        is_odd = ranks.rank == 1
        cases: list[Any] = [
            Last(float(is_odd)),
            Max(1.0) if is_odd else Sum(1.0),
            Histogram(torch.ones(3).double(), edges + is_odd),
            Sum("many") if is_odd else Sum(1),  # type: ignore[arg-type]
            Sum(2**62),  # 2**63 in all
        ]
        for case in cases:
            with pytest.raises((TypeError, ValueError)) as raised:
                merge_metrics({"a name": case}, ranks.world)
            found.append((raised.type.__name__, str(raised.value)))
        assert merge_metrics({"a name": Sum(1)}, ranks.world) == {"a name": Sum(2)}, "a failure is not the end"
    return found


def test_what_one_rank_alone_sees_is_raised_on_all() -> None:
    found = run_ranks(_refused, 2)
    assert found[0] == found[1]
    assert [kind for kind, _ in found[0]] == ["ValueError", "TypeError", "ValueError", "ValueError", "ValueError"]
    for (_, message), part in zip(
        found[0],
        [
            "is 0.0 here and 1.0 there",
            "a Sum here and a Max",
            "different edges",
            "rank 1: total of metric a name is",
            "64 bits",
        ],
        strict=True,
    ):
        assert part in message


# --- bytes and connections -------------------------------------------------------------------------------------------


def _traffic() -> dict[str, tuple[int, int]]:
    """(bytes sent, bytes received) of each TCP connection of this process, by its inode. Of the kernel's `tcp_info`."""
    found = {}
    for path in Path("/proc/self/fd").iterdir():
        name = os.readlink(path) if path.is_symlink() else ""
        if name.startswith("socket:"):
            with socket.socket(fileno=os.dup(int(path.name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6):
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                    (received,), (sent, again) = (
                        struct.unpack_from("<Q", info, 128),
                        struct.unpack_from("<QQ", info, 200),
                    )
                    found[name] = sent - again, received
    return found


def _count(merging: Callable[[Metrics | None, ProcessGroup], Metrics], own: Metrics | None, world: ProcessGroup) -> Any:
    """(bytes sent, bytes received, connections used) by the second of two merges. Collective."""
    merging(own, world)
    exchange.barrier(world)
    before = _traffic()
    merging(own, world)
    exchange.barrier(world)
    changes = [
        (sent - before.get(name, (0, 0))[0], received - before.get(name, (0, 0))[1])
        for name, (sent, received) in _traffic().items()
    ]
    used = [change for change in changes if sum(change) > 1024]
    return sum(sent for sent, _ in used), sum(received for _, received in used), len(used)


def _measured() -> dict[str, Any]:
    """Bytes of this rank, for each way and for metrics that are alike, or that only the last rank has."""
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    distributed_c10d.ProcessGroupGloo = ProcessGroupGloo  # with a device for each group, as outside of tests
    torch.manual_seed(0)
    shift = 0.01 * torch.randn(64)
    negative, positive = shift_histograms(shift, shift < 0, shift > 0)
    own: Metrics = {"negative": negative, "positive": positive, **{f"sum/{index}": Sum(1.0) for index in range(40)}}
    flat = flatten(own)
    with layout(ParallelSection()) as ranks:
        odd: Metrics = {**own, "only/here": Sum(1)} if ranks.rank == ranks.world.size() - 1 else own
        last = own if ranks.rank == ranks.world.size() - 1 else None
        return {
            "content": flat.content.numel(),
            "kinds": len(flat.kinds),
            "settings": len(flat.settings),
            "alike": _count(merge_metrics, own, ranks.world),
            "a name more": _count(merge_metrics, odd, ranks.world),
            "only the last": _count(merge_metrics, last, ranks.world),
            "by objects": _count(_by_objects, own, ranks.world),
        }


OVERHEAD = 3000
"""Bytes of headers, digests, announcements and barriers."""


def _is_bounded(found: dict[str, Any], way: str, extra: int = 0) -> bool:
    """Whether a rank sends its content, hands the sum on to at most two, and receives the sum, as large as it is."""
    sent, received, _ = found[way]
    most = found["content"] + extra + OVERHEAD
    return received <= most and sent <= 2 * most


@pytest.fixture(scope="module")
def measured() -> dict[int, list[dict[str, Any]]]:
    """What `_measured` gives of each rank, by the number of ranks."""
    return {size: run_ranks(_measured, size) for size in (2, 4, 8)}


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_sends_its_content_and_receives_the_sum(
    measured: dict[int, list[dict[str, Any]]], world_size: int
) -> None:
    for found in measured[world_size][1:]:
        assert found["alike"][0] >= found["content"], "not all that was sent was counted"
        assert found["alike"][1] >= found["content"], "not all that was received was counted"
        assert _is_bounded(found, "alike")
        assert _is_bounded(found, "a name more", found["kinds"])
        # Who has nothing receives what the sum is as well.
        assert _is_bounded(found, "only the last", found["kinds"] + found["settings"])
        assert not _is_bounded(found, "by objects"), "the former way was not noticed"


def test_a_rank_whose_metrics_do_not_count_sends_nothing(measured: dict[int, list[dict[str, Any]]]) -> None:
    """The third of four also hands nothing on."""
    assert measured[4][2]["only the last"][0] <= OVERHEAD
    assert measured[4][2]["alike"][0] > OVERHEAD


def test_a_rank_receives_no_more_in_a_larger_world(measured: dict[int, list[dict[str, Any]]]) -> None:
    few, many = measured[2][-1], measured[8][-1]
    assert abs(many["alike"][1] - few["alike"][1]) <= OVERHEAD
    assert many["by objects"][1] >= 6 * few["by objects"][1], "the former way was not noticed"


def test_only_the_rank_that_adds_up_connects_to_all(measured: dict[int, list[dict[str, Any]]]) -> None:
    assert measured[8][0]["alike"][2] == 7
    assert max(found["alike"][2] for found in measured[8][1:]) <= 3  # log2 of the ranks
