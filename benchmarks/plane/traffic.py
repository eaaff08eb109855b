"""Bytes between ranks: by formula, as the code counts them, and as the kernel does."""

from __future__ import annotations

import math
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from benchmarks.plane.responses import PROMPT_TOKENS, Responses, decide
from megatron_fipo.config import Config
from megatron_fipo.parallel import by_value, exchange
from megatron_fipo.parallel.batch import divide
from megatron_fipo.rl.judged_group import to_wire

Messages = Counter[tuple[int, int]]
"""Bytes by (rank that sends, rank that receives)."""

HEAD_BYTES = 4 * (6 + 3)
"""Of a trajectory of one segment, see `megatron_fipo.rl.flat_trajectories`."""
LENGTH_BYTES = 8
"""Sent ahead of every array."""


@dataclass(frozen=True)
class Places:
    """Which rank is where. The first rank of each node generates; tp is as large as a node, or smaller.

    Attributes:
        tp, cp: sizes of the layout; the rest is data-parallel.
    """

    nodes: int
    ranks_per_node: int
    tp: int
    cp: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def dp(self) -> int:
        return self.world_size // (self.tp * self.cp)

    def node(self, index: int) -> range:
        """Ranks of a node."""
        return range(index * self.ranks_per_node, (index + 1) * self.ranks_per_node)

    def between_nodes(self, messages: Messages) -> Messages:
        """What crosses from one node to another, by node."""
        found: Messages = Counter()
        for (source, target), size in messages.items():
            ends = source // self.ranks_per_node, target // self.ranks_per_node
            if ends[0] != ends[1]:
                found[ends] += size
        return found


def of_data_plane(responses: Responses, config: Config, places: Places) -> tuple[Messages, Messages]:
    """All messages of a step by formula: (from one rank to another, the broadcast of the plan)."""
    judged = responses.judged(places.nodes)
    messages: Messages = Counter()
    for leader in range(1, places.nodes):
        wire = to_wire(judged[leader :: places.nodes])
        messages[places.node(leader)[0], 0] += LENGTH_BYTES + len(by_value.dumps(wire))
    plan, group_sizes = decide(judged, config)
    wanted = divide(plan["num_tokens"].tolist(), group_sizes, config, places.dp).wanted
    flat = [HEAD_BYTES + 4 * PROMPT_TOKENS + 8 * (size - PROMPT_TOKENS) for size in plan["num_tokens"].tolist()]
    holders = [places.node(leader)[0] for leader in plan["leader"].tolist()]
    for index in range(places.nodes):
        first, *others = places.node(index)
        indices = set().union(*(wanted[rank // (places.tp * places.cp)] for rank in places.node(index)))
        for holder in {holders[one] for one in indices} - {first}:
            messages[holder, first] += LENGTH_BYTES + sum(flat[one] for one in indices if holders[one] == holder)
        for other in others:
            own = wanted[other // (places.tp * places.cp)]
            messages[first, other] += LENGTH_BYTES + sum(flat[one] for one in own)
    return messages, _broadcast(plan_bytes(plan, group_sizes), places.world_size)


def plan_bytes(plan: NDArray[Any], group_sizes: Sequence[int]) -> int:
    """What `decided_by_leader` sends."""
    return len(by_value.dumps(((plan, list(group_sizes)), None)))


def _broadcast(size: int, world_size: int) -> Messages:
    """gloo's tree: in round i the first 2^i ranks send to the 2^i next ones."""
    rounds = range(math.ceil(math.log2(world_size)) if world_size > 1 else 0)
    pairs = [(rank, rank + 2**i) for i in rounds for rank in range(2**i)]
    return Counter({(source, target): size for source, target in pairs if target < world_size})


def of_former_way(largest_share: int, places: Places) -> Messages:
    """gloo's ring: everyone passes all shares on, each filled up to the largest."""
    size = places.world_size
    return Counter({(rank, (rank + 1) % size): (size - 1) * largest_share for rank in range(size)})


def sent(messages: Messages, size: int) -> list[int]:
    """Bytes that leave each of `size` ranks or nodes."""
    return [sum(count for (source, _), count in messages.items() if source == one) for one in range(size)]


def received(messages: Messages, size: int) -> list[int]:
    """Bytes that reach each of `size` ranks or nodes."""
    return [sum(count for (_, target), count in messages.items() if target == one) for one in range(size)]


class CountedMessages:
    """Counts what `exchange.send_arrays` sends and receives in this process, as long as it is entered."""

    def __init__(self) -> None:
        self.sent, self.received = 0, 0
        self._original: Callable[..., dict[int, Tensor]] = exchange.send_arrays

    def __enter__(self) -> CountedMessages:
        exchange.send_arrays = self._send
        return self

    def __exit__(self, *exception: object) -> None:
        exchange.send_arrays = self._original

    def _send(self, parts: Any, sources: Any, dtype: Any, group: Any) -> dict[int, Tensor]:
        own, found = group.rank(), self._original(parts, sources, dtype, group)
        self.sent += sum(LENGTH_BYTES + part.nbytes for target, part in parts.items() if target != own)
        self.received += sum(LENGTH_BYTES + part.nbytes for source, part in found.items() if source != own)
        return found


def kernel_counters() -> tuple[int, int]:
    """Bytes (sent, received) over this process's open TCP connections so far: gloo's, with its own words, and the
    store's. What was sent twice counts once."""
    total_sent, total_received = 0, 0
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # no socket, not TCP, or closed meanwhile
            if os.readlink(path).startswith("socket:"):
                with socket.socket(fileno=os.dup(int(path.name))) as connection:
                    found = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216)
                all_sent, sent_again = struct.unpack_from("QQ", found, 200)  # tcpi_bytes_sent, tcpi_bytes_retrans
                total_sent += all_sent - sent_again
                total_received += struct.unpack_from("Q", found, 128)[0]  # tcpi_bytes_received
    return total_sent, total_received
