"""Collectives over tensors and Python objects, for everything outside Megatron's own communication."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

T = TypeVar("T")


def all_gather_objects(own: T, group: ProcessGroup) -> list[T]:
    """Every rank's object, by rank. Collective; objects must be picklable."""
    if group.size() == 1:
        return [own]
    gathered: list[T | None] = [None] * group.size()
    dist.all_gather_object(gathered, own, group=group)
    return gathered  # type: ignore[return-value]


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
    return any(all_gather_objects(flag, group))


def check_same(value: T, what: str, group: ProcessGroup) -> None:
    """Raise RuntimeError on every rank if ranks disagree on a value. Collective."""
    values = all_gather_objects(value, group)
    different = [rank for rank, other in enumerate(values) if other != values[0]]
    if different:
        raise RuntimeError(f"{what} differs: {values[0]!r} on rank 0, {values[different[0]]!r} on rank {different[0]}")


def barrier(group: ProcessGroup) -> None:
    """Wait until every rank is here. Collective."""
    if group.size() > 1:
        dist.barrier(group=group, device_ids=[torch.cuda.current_device()] if _uses_nccl(group) else None)


def _uses_nccl(group: ProcessGroup) -> bool:
    return torch.cuda.is_available() and "nccl" in str(dist.get_backend(group))
