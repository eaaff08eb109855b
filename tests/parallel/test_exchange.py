"""Collectives over tensors, objects and metrics."""

from __future__ import annotations

import os
import pickle
import signal
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_fipo.config import ParallelSection
from megatron_fipo.metrics.reductions import Distribution, Max, Mean, Sum, scalars
from megatron_fipo.parallel import by_value, exchange, local_ranks
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.agreement import decided_by_leader
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.system.disk import DiskError
from tests.parallel.layouts import layout
from tests.parallel.ranks import RankError, run_ranks


def _exchange(world_size: int) -> None:
    with layout(ParallelSection()) as ranks:
        rank, world = dist.get_rank(), ranks.world
        assert exchange.all_gather_objects({"rank": rank}, world) == [{"rank": r} for r in range(world_size)]
        own = torch.arange(6).view(2, 3) + 10 * rank
        gathered = exchange.all_gather_tensors(own, world)
        assert [part.tolist() for part in gathered] == [
            (torch.arange(6).view(2, 3) + 10 * r).tolist() for r in range(world_size)
        ]
        gathered = exchange.all_gather_tensors(own.t(), world)  # not contiguous
        assert gathered[-1].tolist() == (torch.arange(6).view(2, 3).t() + 10 * (world_size - 1)).tolist()
        last = world_size - 1
        received = exchange.broadcast(torch.full((3,), float(rank)), last, world)
        assert received.tolist() == [float(last)] * 3
        for flagged in range(world_size):
            assert exchange.any_rank(rank == flagged, world)
        assert not exchange.any_rank(False, world)
        # The last rank's metrics do not count; 0-d tensors travel as numbers.
        metrics = {
            "sum": Sum(torch.tensor(1.0 + rank)),
            "mean": Mean(torch.tensor(6.0), torch.tensor(2 + rank)),
            "max": Max(float(rank)),
            "values": Distribution(torch.tensor([float(rank)])),
            f"only/{rank}": Sum(rank),
        }
        counts = rank < last or world_size == 1
        merged = merge_metrics(metrics if counts else None, world)  # type: ignore[arg-type]
        counted = range(max(last, 1))
        numbers = scalars(merged)
        assert numbers["sum"] == sum(1 + r for r in counted)
        assert numbers["mean"] == 6 * len(counted) / sum(2 + r for r in counted)
        assert numbers["max"] == counted[-1]
        assert sorted(merged["values"].values.tolist()) == list(counted)  # type: ignore[union-attr]
        assert {name for name in merged if name.startswith("only/")} == {f"only/{r}" for r in counted}
        exchange.barrier(world)
        _send_arrays(world)
        _send_objects(world)
        _broadcast_objects(world)
        _decide(world)


def _send_arrays(world: ProcessGroup) -> None:
    """From each rank to itself and to the next one, arrays of lengths that no other has and of none."""
    own, size = world.rank(), world.size()
    before, behind = (own - 1) % size, (own + 1) % size
    assert exchange.send_arrays({}, [], torch.float32, world) == {}
    for dtype in (torch.int32, torch.float64, torch.uint8):
        parts = {behind: torch.full((own,), own, dtype=dtype), own: torch.arange(3).to(dtype)}
        received = exchange.send_arrays(parts, sorted({before, own}), dtype, world)
        assert received.keys() == {before, own}
        assert received[own] is parts[own], "what stays is not copied"
        if before != own:
            assert torch.equal(received[before], torch.full((before,), before, dtype=dtype))
            assert received[before].dtype is dtype
    if size == 1:
        return
    # The last rank sends and receives nothing; what is not contiguous arrives in its order.
    parts = {1: torch.arange(8).view(4, 2).t().reshape(-1)[::2]} if own == 0 else {}
    received = exchange.send_arrays(parts, [0] if own == 1 else [], torch.int64, world)
    assert {rank: part.tolist() for rank, part in received.items()} == ({0: [0, 4, 1, 5]} if own == 1 else {})
    # More than any buffer between the two takes in: one that sends before it receives would wait for ever.
    if own < 2:
        large = torch.full((_LARGE,), own + 7, dtype=torch.uint8)
        (received_large,) = exchange.send_arrays({1 - own: large}, [1 - own], torch.uint8, world).values()
        assert len(received_large) == _LARGE
        assert bool((received_large == 1 - own + 7).all())


_LARGE = 64 * 2**20
"""Bytes."""


def _send_objects(world: ProcessGroup) -> None:
    own, size = world.rank(), world.size()
    sent = {0: (own, torch.full((own,), 0.5), None)}
    received = exchange.send_objects(sent, list(range(size)) if own == 0 else [], world)
    assert list(received) == (list(range(size)) if own == 0 else [])
    for rank, (number, tensor, nothing) in received.items():
        assert (number, tensor.tolist(), nothing) == (rank, rank * [0.5], None)
    assert exchange.send_objects({own: None}, [own], world) == {own: None}


def _broadcast_objects(world: ProcessGroup) -> None:
    cannot_be_pickled = lambda: None  # noqa: E731
    for told in (None, 0, {"all": [torch.arange(3)]}):
        received = exchange.broadcast_object(told if world.rank() == 0 else cannot_be_pickled, world)  # type: ignore[misc]
        assert str(received) == str(told)


class _OwnError(RuntimeError):
    pass


def _decide(world: ProcessGroup) -> None:
    """By rank 0 alone, with its errors on every rank."""
    for decision in (None, False, 17):
        asked: list[int] = []

        def action(asked: list[int] = asked, decision: object = decision) -> object:
            asked.append(world.rank())
            return decision

        assert decided_by_leader(action, world) is decision
        assert asked == ([0] if world.rank() == 0 else [])
    for kind, errors in ((DiskError, ()), (ValueError, ()), (_OwnError, ((_OwnError,),))):

        def fail(kind: type[Exception] = kind) -> None:
            raise kind("what rank 0 met")

        with pytest.raises(kind, match=r"^what rank 0 met$") as met:
            decided_by_leader(fail, world, *errors)
        assert type(met.value) is kind


@pytest.mark.parametrize("world_size", [1, 3])
def test_every_rank_gets_the_same(world_size: int) -> None:
    run_ranks(_exchange, world_size, world_size, timeout_s=60)


def _groups_of_a_layout() -> tuple[int, ...]:
    with layout(ParallelSection(tp=2, pp=2)) as ranks:
        sizes = (ranks.tp.size(), ranks.pp.size(), ranks.cp.size(), ranks.dp.size(), ranks.dp_cp.size())
        assert sizes == (2, 2, 1, 1, 1)
        assert ranks.rank == dist.get_rank()
        assert ranks.reports_loss == (ranks.is_last_stage and ranks.tp.rank() == 0)
        mine = (ranks.tp.rank(), ranks.pp.rank(), int(ranks.reports_loss))
    with layout(ParallelSection(cp=2)) as ranks:
        assert (ranks.cp.size(), ranks.dp.size(), ranks.dp_cp.size()) == (2, 2, 4)
    return mine


def test_groups_are_those_of_the_layout_and_can_be_built_anew() -> None:
    found = run_ranks(_groups_of_a_layout, 4, timeout_s=60)
    assert sorted(found) == [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 0)]


def _too_large_a_layout() -> None:
    parallel_groups.initialize(ParallelSection(tp=2, cp=2), seed=0)


def test_a_layout_that_does_not_fit_the_processes_is_refused() -> None:
    with pytest.raises(RankError, match=r"2 processes cannot be split into layouts of parallel\.tp=2"):
        run_ranks(_too_large_a_layout, 2, timeout_s=60)


# --- pickles by value ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3)])
def test_a_tensor_comes_back_with_its_bits_and_a_memory_of_its_own(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (3 * torch.randn(shape)).to(dtype)
    kept = tensor.clone()
    pickled = by_value.dumps({"one": tensor, "turned": tensor.t() if tensor.dim() == 2 else tensor})
    tensor.zero_()
    found = pickle.loads(pickled)
    for given, expected in ((found["one"], kept), (found["turned"], kept.t() if kept.dim() == 2 else kept)):
        assert given.dtype is dtype
        assert given.shape == expected.shape
        assert torch.equal(given, expected)


def test_a_tensor_that_is_more_than_its_numbers_stays_what_it_is() -> None:
    weight = torch.nn.Parameter(torch.arange(3.0))
    marked = torch.arange(2)
    marked.mark = "a mark"  # type: ignore[attr-defined]
    found = pickle.loads(by_value.dumps([weight, weight.detach().requires_grad_(), torch.eye(2).to_sparse(), marked]))
    assert isinstance(found[0], torch.nn.Parameter)
    assert found[1].requires_grad
    assert torch.equal(found[2].to_dense(), torch.eye(2))
    assert found[3].mark == "a mark"
    small = torch.zeros(1)
    assert 3 * len(by_value.dumps(small)) < len(pickle.dumps(small)), "a plain one went torch's way"


# --- the launcher itself ---------------------------------------------------------------------------------------------


def _fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ZeroDivisionError("told to")
    with layout(ParallelSection()) as ranks:  # waits for rank 1, which never comes
        exchange.barrier(ranks.world)


def test_the_failing_ranks_traceback_is_what_one_sees() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2:.*ZeroDivisionError: told to"):
        run_ranks(_fail_on_rank_1, 2, timeout_s=60)


def _never_end() -> None:
    if os.environ["RANK"] == "1":
        signal.pause()


def test_a_rank_that_never_ends_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one ends however long it takes; only then does the time count."""
    wait = local_ranks.wait

    def for_the_other_first(pipes: list[Any], timeout: float) -> list[Any]:
        return wait(pipes, None if len(pipes) == 2 else timeout)

    monkeypatch.setattr(local_ranks, "wait", for_the_other_first)
    with pytest.raises(RankError, match=r"ranks \[1\] of 2 did not end within 1 s"):
        run_ranks(_never_end, 2, timeout_s=1)
