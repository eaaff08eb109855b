"""Collectives over tensors and Python objects, for everything outside Megatron's own communication."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import by_value

T = TypeVar("T")

_LENGTH_TAG, _PART_TAG = 1, 2
"""Of the messages of `send_arrays`; all others have 0."""


def all_gather_objects(own: T, group: ProcessGroup) -> list[T]:
    """Every rank's object, by rank. Collective; objects must be picklable."""
    if group.size() == 1:
        return [own]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, by_value.dumps(own), group=group)
    return [pickle.loads(sent) for sent in gathered]


def broadcast_object(own: T | None, group: ProcessGroup) -> T:
    """The object of the group's first rank, on every rank. Collective; what others hand in is not looked at."""
    if group.size() == 1:
        return cast("T", own)
    sent = [by_value.dumps(own) if group.rank() == 0 else None]
    dist.broadcast_object_list(sent, group=group, group_src=0)
    assert sent[0] is not None
    received: T = pickle.loads(sent[0])
    return received


def send_arrays(
    parts: Mapping[int, Tensor], sources: Sequence[int], dtype: torch.dtype, group: ProcessGroup
) -> dict[int, Tensor]:
    """Send arrays to some ranks, and receive one from each of some others. Nobody else takes part.

    Only ranks that have something for one another connect.

    Args:
        parts: 1-d tensors on the CPU, of any lengths, by the rank of the group that each is for.
        sources: the ranks of the group that send this one something, in this same call.
        dtype: of what is sent and received.

    Returns:
        What they sent, by rank. What a rank sends itself is not copied.
    """
    own = group.rank()
    works: list[Any] = []
    for target, part in parts.items():
        if target != own:
            works.append(dist.isend(torch.tensor([len(part)]), group=group, group_dst=target, tag=_LENGTH_TAG))
            works.append(dist.isend(part.contiguous(), group=group, group_dst=target, tag=_PART_TAG))
    received = {}
    for source in sources:
        if source == own:
            received[source] = parts[own]
            continue
        length = torch.empty(1, dtype=torch.int64)
        dist.recv(length, group=group, group_src=source, tag=_LENGTH_TAG)
        received[source] = torch.empty(int(length), dtype=dtype)
        works.append(dist.irecv(received[source], group=group, group_src=source, tag=_PART_TAG))
    for work in works:
        work.wait()
    return received


def send_objects(parts: Mapping[int, Any], sources: Sequence[int], group: ProcessGroup) -> dict[int, Any]:
    """`send_arrays` for objects that can be pickled."""
    sent = {rank: torch.frombuffer(bytearray(by_value.dumps(part)), dtype=torch.uint8) for rank, part in parts.items()}
    received = send_arrays(sent, sources, torch.uint8, group)
    return {rank: pickle.loads(part.numpy().tobytes()) for rank, part in received.items()}


def all_to_all_parts(own: Tensor, to_send: list[int], to_receive: list[int], group: ProcessGroup) -> Tensor:
    """What every rank has for this one. Collective.

    Args:
        own: [sum of to_send] this rank's elements for rank 0, then those for rank 1, and so on.
        to_send: number of elements for each rank.
        to_receive: number of elements from each rank.

    Returns:
        [sum of to_receive] by source.
    """
    if group.size() == 1:
        return own
    received = own.new_empty(sum(to_receive))
    dist.all_to_all_single(received, own, to_receive, to_send, group=group)
    return received


def all_gather_tensors(own: Tensor, group: ProcessGroup) -> list[Tensor]:
    """Every rank's tensor, by rank; all of one shape and dtype. Collective."""
    if group.size() == 1:
        return [own]
    gathered = own.new_empty(group.size() * own.numel())
    dist.all_gather_into_tensor(gathered, own.reshape(-1), group=group)
    return [part.view(own.shape) for part in gathered.chunk(group.size())]


def broadcast(tensor: Tensor, source: int, group: ProcessGroup) -> Tensor:
    """The tensor of the group's rank `source`, on every rank; received in place elsewhere. Collective."""
    if group.size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, group_src=source, group=group)
    return tensor


def any_rank(flag: bool, group: ProcessGroup) -> bool:
    """Whether the flag is set on any rank; the same answer everywhere. Collective."""
    if group.size() == 1:
        return flag
    total = torch.tensor(float(flag), device=_device(group))
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    return bool(total.item())


def barrier(group: ProcessGroup) -> None:
    """Wait until every rank is here. Collective."""
    any_rank(False, group)


def _device(group: ProcessGroup) -> torch.device:
    """Return the device for small tensors: the CPU if the group can use it, as with gloo, else this rank's GPU."""
    backend = str(dist.get_backend_config(group))
    return torch.device("cpu") if "gloo" in backend else torch.device("cuda", torch.cuda.current_device())
