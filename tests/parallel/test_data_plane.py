"""Responses come from the ranks that hold them to those that train on them: whole, and once for each node."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import data_plane
from megatron_fipo.parallel.batch import Division, build_minibatches, build_own_minibatches, divide
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.flat_trajectories import flatten, unflatten
from megatron_fipo.rl.judged_group import JudgedGroup, plan_of
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.trajectory import Group, Trajectory
from tests.parallel.layouts import PAD_TOKEN, Case, config_of, groups_of_step, layout
from tests.parallel.ranks import RankError, run_ranks

P = ParallelSection

PLACES = {
    2: [(P(), 2, "all"), (P(cp=2), 2, "first"), (P(tp=2), 1, "all"), (P(pp=2), 1, "first")],
    4: [(P(cp=2), 2, "first"), (P(tp=2), 2, "all"), (P(), 4, "one")],
    8: [(P(tp=2, cp=2), 4, "first"), (P(pp=2, cp=2), 2, "all")],
}
"""By number of ranks: (layout, ranks on a node, which ranks generate: all, the first of each node, or rank 0 alone)."""


def _generates(rank: int, ranks_per_node: int, who: str) -> bool:
    return {"all": True, "first": rank % ranks_per_node == 0, "one": rank == 0}[who]


def _plane(ranks: ParallelGroups, ranks_per_node: int, who: str) -> DataPlane:
    os.environ["LOCAL_RANK"] = str(ranks.rank % ranks_per_node)
    return DataPlane(ranks, _generates(ranks.rank, ranks_per_node, who))


def _held(plane: DataPlane) -> list[Group]:
    """This rank's part of the groups that `build_minibatches` has on every rank."""
    groups = list(groups_of_step(0))
    return [] if plane.leader is None else groups[plane.leader :: plane.num_leaders]


class _Counted:
    """Notes what leaves this rank: for each call the responses' places in the batch, by the rank that they go to."""

    def __init__(self) -> None:
        self.calls: list[dict[int, list[int]]] = []
        self.original = data_plane.exchange.send_arrays
        data_plane.exchange.send_arrays = self

    def __call__(self, parts: dict[int, Tensor], *others: Any) -> dict[int, Tensor]:
        if parts and next(iter(parts.values())).dtype is torch.int32:
            self.calls.append({rank: [index for index, _ in unflatten(part.numpy())] for rank, part in parts.items()})
        return self.original(parts, *others)

    def stop(self) -> None:
        data_plane.exchange.send_arrays = self.original


def _assert_same(one: PackedBatch, other: PackedBatch) -> None:
    for field in fields(PackedBatch):
        left, right = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(left, right) if isinstance(left, Tensor) else field.name == "segments" or left == right


def _delivered(plane: DataPlane, ranks: ParallelGroups, config: Any) -> tuple[Division, dict[int, Trajectory]]:
    """The step as the trainer does it, from what each rank holds."""
    own = _held(plane)
    judged = plane.judged(own)
    if ranks.rank == 0:
        assert [group.prompt_id for group in judged] == [0, 1, 2, 3]
    else:
        assert judged == []
    for group, whole in zip(judged, groups_of_step(0), strict=False):
        group.advantages = np.array([sample.advantage for sample in whole.samples])
    plan = data_plane.exchange.broadcast_object(plan_of(judged), ranks.world)
    division = divide(plan["num_tokens"].tolist(), [4] * 4, config, ranks.dp.size())
    by_prompt = {group.prompt.prompt_id: group for group in own}

    def trajectory(index: int) -> Trajectory:
        return by_prompt[int(plan["prompt_id"][index])].samples[int(plan["sample_index"][index])]

    samples = plane.deliver(trajectory, plan["leader"], division.wanted)
    for index, sample in samples.items():
        sample.advantage = float(plan["advantage"][index])
    return division, samples


def _as_if_all_had_all(world_size: int, spoiled: bool = False) -> None:
    for parallel, ranks_per_node, who in PLACES[world_size]:
        config = config_of(Case("any", parallel=parallel), "unused")
        with layout(parallel) as ranks:
            plane = _plane(ranks, ranks_per_node, who)
            counted = _Counted()
            try:
                division, samples = _delivered(plane, ranks, config)
            finally:
                counted.stop()
            if spoiled:
                samples[max(samples)].segments[0].token_ids[-1] += 1
            own = build_own_minibatches(division, samples, config, ranks, PAD_TOKEN)
            expected = build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN)
            for microbatches, of_all in zip(own, expected, strict=True):
                for one, other in zip(microbatches, of_all, strict=True):
                    _assert_same(one, other)
            assert samples.keys() == division.wanted[ranks.dp.rank()]
            _check_each_once(counted, ranks, division, ranks_per_node)


def _check_each_once(counted: _Counted, ranks: ParallelGroups, division: Division, ranks_per_node: int) -> None:
    """Each response goes once to the first rank of each node that trains on it, and from there to who needs it."""
    places = data_plane.exchange.all_gather_objects((ranks.dp.rank(), counted.calls), ranks.world)
    for first in range(0, ranks.world.size(), ranks_per_node):
        node = range(first, first + ranks_per_node)
        needed = sorted(set().union(*(division.wanted[places[rank][0]] for rank in node)))
        arrived: dict[int, list[int]] = {rank: [] for rank in node}
        for _, calls in places:
            for call in calls:
                for rank in arrived:
                    arrived[rank] += call.get(rank, [])
        for rank, found in arrived.items():
            of_rank = needed if rank == first else sorted(division.wanted[places[rank][0]])
            assert sorted(found) == of_rank, (rank, found, of_rank)


@pytest.mark.parametrize("world_size", PLACES)
def test_microbatches_are_those_of_ranks_that_have_everything(world_size: int) -> None:
    run_ranks(_as_if_all_had_all, world_size, world_size)


def test_a_changed_token_would_be_noticed() -> None:
    with pytest.raises(RankError, match="_assert_same"):
        run_ranks(_as_if_all_had_all, 2, 2, True)


def _word(plane: DataPlane) -> int:
    """Bytes of what a rank tells rank 0."""
    judged = [JudgedGroup.of(group, plane.leader or 0) for group in _held(plane)]
    return sum(group.rows.nbytes for group in judged)


def _tell_and_keep() -> None:
    with layout(P()) as ranks:
        plane = _plane(ranks, 2, "all")
        own = _held(plane)
        before = [flatten(enumerate(group.samples)).tobytes() for group in own]
        judged = plane.judged(own)
        assert sum(group.rows.nbytes for group in judged) == (16 * 32 if ranks.rank == 0 else 0)
        assert _word(plane) == 8 * 32
        assert [flatten(enumerate(group.samples)).tobytes() for group in own] == before, "tokens stay where they are"
        assert plane.gathered([ranks.rank]) == ([0, 1] if ranks.rank == 0 else [])


def test_rank_0_hears_32_bytes_a_response() -> None:
    run_ranks(_tell_and_keep, 2)
