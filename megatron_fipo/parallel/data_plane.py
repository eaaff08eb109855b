"""How judged responses get from the ranks that generate to those that train on them.

The ranks that generate keep what they have generated. Rank 0 sees 32 bytes of a response and decides what the step
trains on. Tokens move once, when that is decided: from the rank that holds them to the first rank of each node that
needs them, and from there to the node's others. No rank ever holds all of a step, unless it needs all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups, subgroup
from megatron_fipo.parallel.nodes import node_of, own_local_rank
from megatron_fipo.rl.flat_trajectories import flatten, unflatten
from megatron_fipo.rl.judged_group import JudgedGroup, from_wire, to_wire
from megatron_fipo.rl.trajectory import Group, Trajectory

T = TypeVar("T")


class DataPlane:
    """The ways of responses between ranks. Making it, and its methods, are collective over all ranks.

    Attributes:
        world: all ranks.
        leader: this rank's number among those that generate; None where it generates nothing.
        num_leaders: how many ranks generate. Rank 0 is the first of them.
    """

    def __init__(self, ranks: ParallelGroups, generates: bool, timeout_s: float) -> None:
        """
        Args:
            generates: whether this rank generates; rank 0 does.
            timeout_s: longest wait inside one collective.
        """
        places = exchange.all_gather_objects((generates, own_local_rank(), ranks.dp.rank()), ranks.world)
        local_ranks = [local_rank for _, local_rank, _ in places]
        leaders = [rank for rank, (is_leader, _, _) in enumerate(places) if is_leader]
        assert leaders[:1] == [0], "rank 0 decides, by what it has generated among others"
        self.num_leaders = len(leaders)
        self.leader = leaders.index(ranks.rank) if generates else None
        self._ranks, self.world = ranks, ranks.world
        nodes = [node_of(rank, local_ranks) for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
        node = next(node for node in nodes if ranks.rank in node)
        movers = sorted({*leaders, *(node[0] for node in nodes)})
        dp_ranks = {node[0]: {places[rank][2] for rank in node} for node in nodes}
        self._served = [dp_ranks.get(mover, set()) for mover in movers]
        """By mover: the data-parallel ranks on the node that it receives for."""
        self._leaders = self._group(leaders, timeout_s)
        self._movers = self._leaders if movers == leaders else self._group(movers, timeout_s)
        self._node = self._group(node, timeout_s)

    def _group(self, ranks: Sequence[int], timeout_s: float) -> ProcessGroup | None:
        """A group of these ranks; None on others."""
        if len(ranks) == self._ranks.world.size():
            return self._ranks.world
        return subgroup(ranks, timeout_s) if self._ranks.rank in ranks else None

    def judged(self, own: Sequence[Group]) -> list[JudgedGroup]:
        """What is known of all ranks' groups without their tokens, on rank 0, by prompt and source; [] elsewhere.

        Args:
            own: this rank's groups; none where it generates nothing.
        """
        if self.leader is None or self._leaders is None:
            return []
        wire = to_wire([JudgedGroup.of(group, self.leader) for group in own])
        return from_wire(exchange.gather_objects(wire, self._leaders) or [])

    def gathered(self, own: Sequence[T]) -> list[T]:
        """What each rank that generates hands in, by rank, on rank 0; [] elsewhere. For small things."""
        if self._leaders is None:
            return []
        return [one for part in exchange.gather_objects(list(own), self._leaders) or [] for one in part]

    def deliver(
        self,
        trajectory: Callable[[int], Trajectory],
        leaders: NDArray[np.int16],
        wanted: Sequence[Collection[int]],
    ) -> dict[int, Trajectory]:
        """Bring trajectories to the ranks that train on them; without source, text and verdict.

        Args:
            trajectory: what this rank holds at an index into the step's batch.
            leaders: [all responses of the batch] which of the ranks that generate holds each of them.
            wanted: for each data-parallel rank, which of the batch's responses it trains on.

        Returns:
            Those that this rank trains on, by index.
        """
        received = torch.empty(0, dtype=torch.int32)
        if self._movers is not None:
            parts = [
                flatten((index, trajectory(index)) for index in self._to_send(dp_ranks, leaders, wanted))
                for dp_ranks in self._served
            ]
            received = exchange.all_to_all_arrays([torch.from_numpy(part) for part in parts], self._movers)
        assert self._node is not None, "this rank is one of its node's"
        flat = exchange.broadcast_array(received, self._node).numpy()
        return dict(unflatten(flat, wanted[self._ranks.dp.rank()]))

    def _to_send(
        self, dp_ranks: Collection[int], leaders: NDArray[np.int16], wanted: Sequence[Collection[int]]
    ) -> list[int]:
        """What this rank holds of that which some data-parallel ranks want, ascending."""
        if self.leader is None:
            return []
        return sorted(index for dp in dp_ranks for index in wanted[dp] if leaders[index] == self.leader)
