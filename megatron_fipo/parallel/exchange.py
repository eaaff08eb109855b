"""Collectives over tensors and Python objects, for everything outside Megatron's own communication."""

from __future__ import annotations

import pickle
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import by_value

T = TypeVar("T")


def all_gather_objects(own: T, group: ProcessGroup) -> list[T]:
    """Every rank's object, by rank. Collective; objects must be picklable."""
    if group.size() == 1:
        return [own]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, by_value.dumps(own), group=group)
    return [pickle.loads(sent) for sent in gathered]


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
