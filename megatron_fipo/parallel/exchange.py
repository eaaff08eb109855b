"""Collectives over tensors and Python objects, for everything outside Megatron's own communication."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.metrics.reductions import Metrics, merge

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
    total = torch.tensor(float(flag), device=_device(group))
    dist.all_reduce(total, op=dist.ReduceOp.MAX, group=group)
    return bool(total.item())


def merge_metrics(own: Metrics | None, group: ProcessGroup) -> Metrics:
    """Add up every rank's metrics; None where a rank's do not count. The same result everywhere. Collective."""
    return merge([part for part in all_gather_objects(_on_cpu(own), group) if part is not None])


def _on_cpu(metrics: Metrics | None) -> Metrics | None:
    """The same with every tensor on the CPU, 0-d ones as numbers."""
    if metrics is None:
        return None
    moved: Metrics = {}
    for name, metric in metrics.items():
        tensors: dict[str, Any] = {
            field.name: value.item() if value.dim() == 0 else value.cpu()
            for field in fields(metric)
            if isinstance(value := getattr(metric, field.name), Tensor)
        }
        moved[name] = replace(metric, **tensors)
    return moved


def barrier(group: ProcessGroup) -> None:
    """Wait until every rank is here. Collective."""
    any_rank(False, group)


def _device(group: ProcessGroup) -> torch.device:
    """Where small tensors go: the CPU if the group can, as with gloo, else this rank's GPU."""
    backend = str(dist.get_backend_config(group))
    return torch.device("cpu") if "gloo" in backend else torch.device("cuda", torch.cuda.current_device())
