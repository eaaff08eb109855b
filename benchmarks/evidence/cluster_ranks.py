"""The code that each rank of the part `cluster` runs: collectives over every group, and a layout's actor."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.evidence import models
from benchmarks.evidence.measuring import time_calls
from benchmarks.evidence.report import Settings
from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import cpu
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.groups import ParallelGroups

_BYTES, _TINY_BYTES = 128 * 2**20, 64 * 2**10


def layout_of(tp: int, cp: int) -> ParallelSection:
    return ParallelSection(tp=tp, cp=cp, sequence_parallel=tp > 1)


def _begin(parallel: ParallelSection, settings: Settings) -> ParallelGroups:
    if settings.device == "cpu":
        torch.set_num_threads(1)
    cpu.install()
    return parallel_groups.initialize(parallel, seed=0)


def _in_step(settings: Settings) -> Settings:
    """Settings without a time limit for one measurement, so that no rank ends before another."""
    return replace(settings, measurement_s=math.inf)


def collectives(parallel: ParallelSection, settings: Settings) -> list[dict[str, Any]]:
    """Rates of the collectives of every group of a layout, and whether sums are right. Collective over all ranks."""
    ranks = _begin(parallel, settings)
    try:
        names = ("tp", "cp", "dp", "dp_cp", "world")
        groups = {name: getattr(ranks, name) for name in names}
        return [_group_rates(name, group, _in_step(settings)) for name, group in groups.items() if group.size() > 1]
    finally:
        parallel_groups.shut_down()


def _group_rates(name: str, group: ProcessGroup, settings: Settings) -> dict[str, Any]:
    size = group.size()
    count = (_TINY_BYTES if settings.tiny else _BYTES) // 4 // size * size
    whole = torch.full((count,), float(group.rank() + 1), device=settings.device)
    summed, part = whole.clone(), torch.empty(count // size, device=settings.device)
    dist.all_reduce(summed, group=group)
    adds_up = bool((summed == size * (size + 1) / 2).all())
    gathered = torch.empty_like(whole)
    dist.all_gather_into_tensor(gathered, whole[: count // size].clone(), group=group)
    adds_up &= gathered[:: count // size].tolist() == [float(rank + 1) for rank in range(size)]
    values: dict[str, Any] = {"group": name, "size": size, "mib": count * 4 / 2**20, "adds_up": adds_up}
    share = (size - 1) / size
    calls = {
        "all_reduce": (lambda: dist.all_reduce(summed, group=group), 2 * share),
        "all_gather": (lambda: dist.all_gather_into_tensor(gathered, part, group=group), share),
        "broadcast": (lambda: dist.broadcast(whole, dist.get_global_rank(group, 0), group=group), 1.0),
    }
    if settings.device == "cuda":  # gloo has none
        calls["reduce_scatter"] = (lambda: _reduce_scatter(part, whole, group), share)
    for call, (function, traffic) in calls.items():
        milliseconds = time_calls(function, settings).median_ms
        values[f"{call}_ms"] = round(milliseconds, 4)
        values[f"{call}_bus_gb_per_s"] = round(traffic * count * 4 / milliseconds / 1e6, 3)
    return values


def _reduce_scatter(part: Tensor, whole: Tensor, group: ProcessGroup) -> None:
    dist.reduce_scatter_tensor(part, whole, group=group)


def layout(parallel: ParallelSection, folder: Path, settings: Settings) -> dict[str, Any]:
    """Measure an actor of the 32B's width in this layout. Collective over all ranks."""
    ranks = _begin(parallel, settings)
    try:
        size, packing = models.size_of("32b", settings.tiny), models.even_packings(settings.tiny)[1]
        path = models.write_folder(folder / f"rank-{ranks.rank}", size, size.built[-1], max(packing.lengths))
        config = models.config_for(path, packing, parallel=parallel)
        actor = models.build_actor(config, ranks)
        world_size = ranks.world.size()
        return models.measure_actor(actor, config, size, packing, _in_step(settings), world_size).values
    finally:
        parallel_groups.shut_down()
