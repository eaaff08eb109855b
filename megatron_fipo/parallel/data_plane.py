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

from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.nodes import node_of, own_local_rank
from megatron_fipo.rl.flat_trajectories import flatten, select, unflatten
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

    def __init__(self, ranks: ParallelGroups, generates: bool) -> None:
        """
        Args:
            generates: whether this rank generates; rank 0 does.
        """
        places = exchange.all_gather_objects((generates, own_local_rank(), ranks.dp.rank()), ranks.world)
        local_ranks = [local_rank for _, local_rank, _ in places]
        self._leaders = [rank for rank, (is_leader, _, _) in enumerate(places) if is_leader]
        assert self._leaders[:1] == [0], "rank 0 decides, by what it has generated among others"
        self.num_leaders = len(self._leaders)
        self.leader = self._leaders.index(ranks.rank) if generates else None
        self.world, self._rank, self._dp_rank = ranks.world, ranks.rank, ranks.dp.rank()
        nodes = [node_of(rank, local_ranks) for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
        node = next(node for node in nodes if self._rank in node)
        self._node = {rank: places[rank][2] for rank in node}
        """The ranks of this one's node, each with its data-parallel rank."""
        self._served = {node[0]: {places[rank][2] for rank in node} for node in nodes}
        """By the rank that receives for a node: the data-parallel ranks on it."""

    def judged(self, own: Sequence[Group]) -> list[JudgedGroup]:
        """What is known of all ranks' groups without their tokens, on rank 0, by prompt and source; [] elsewhere.

        Args:
            own: this rank's groups; none where it generates nothing.
        """
        return from_wire(self._at_rank_0(to_wire([JudgedGroup.of(group, self.leader or 0) for group in own])))

    def gathered(self, own: Sequence[T]) -> list[T]:
        """What each rank that generates hands in, by rank, on rank 0; [] elsewhere. For small things."""
        return [one for part in self._at_rank_0(list(own)) for one in part]

    def _at_rank_0(self, own: T) -> list[T]:
        """What the ranks that generate have, by rank, on rank 0; [] elsewhere."""
        if self.leader is None:
            return []
        sources = self._leaders if self._rank == 0 else []
        return list(exchange.send_objects({0: own}, sources, self.world).values())

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
        parts, sources = {}, []
        for receiver, dp_ranks in self._served.items():
            indices = sorted(set().union(*(wanted[dp] for dp in dp_ranks)))
            senders = [self._leaders[leader] for leader in leaders[indices].tolist()]
            if own := [index for index, sender in zip(indices, senders, strict=True) if sender == self._rank]:
                parts[receiver] = torch.from_numpy(flatten((index, trajectory(index)) for index in own))
            if receiver == self._rank:
                sources = sorted(set(senders))
        received = exchange.send_arrays(parts, sources, torch.int32, self.world)
        of_node = torch.cat([torch.empty(0, dtype=torch.int32), *received.values()])
        first = min(self._node)
        if self._rank == first:
            shares = {
                dp_rank: torch.from_numpy(select(of_node.numpy(), wanted[dp_rank])) for dp_rank in self._served[first]
            }
            others = {rank: shares[dp_rank] for rank, dp_rank in self._node.items() if rank != first}
            exchange.send_arrays(others, [], torch.int32, self.world)
            flat = shares[self._dp_rank]
        else:
            (flat,) = exchange.send_arrays({}, [first], torch.int32, self.world).values()
        return dict(unflatten(flat.numpy()))
