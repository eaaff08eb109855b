"""A GPU's memory lent to a rollout server and taken back: seconds, bytes, and what stays behind.

On a CPU, where an actor lends nothing, the same storages go through the same class.
"""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager
from typing import Any

import torch

from benchmarks.evidence import models
from benchmarks.evidence.measuring import gib, seconds_of, status_bytes
from benchmarks.evidence.report import Settings
from benchmarks.evidence.workbench import Workbench, workbench
from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.offload import StorageOffload

_ROUNDS = 3
"""Rounds: the first allocates host memory, the second has it; the third shows how much the second's time varies."""


def case_names(settings: Settings) -> list[str]:
    return list(settings.sizes or ("1.5b",))


def prepared(settings: Settings) -> AbstractContextManager[Workbench]:
    return workbench()


def run_case(name: str, bench: Workbench, settings: Settings) -> dict[str, Any]:
    size, packing = models.size_of(name, settings.tiny), models.even_packings(settings.tiny)[1]
    layers, on_gpu = size.built[-1], settings.device == "cuda"
    folder = models.write_folder(bench.folder / f"{size.name}-{layers}", size, layers, max(packing.lengths))
    recompute = models.fitting_recompute(folder, packing, settings.device)
    config = bench.config(size, layers, packing, recompute=recompute)
    actor = bench.build(config)
    microbatches = models.make_microbatches(actor, config, packing)
    actor.update(microbatches, models.loss_of(config, bench.ranks), 0)
    log_probs = actor.log_probs(microbatches)[0]
    values: dict[str, Any] = {"kind": "memory", "model": size.name, "recompute": recompute}
    values |= _empty_cache() if on_gpu else dict.fromkeys(_OF_CACHE)
    lender: Any = actor if on_gpu else _storages(actor)
    offload_s, onload_s, resident, pinned = [], [], [_resident_gib()], [_pinned_gib()]
    left: dict[str, float | None] = dict.fromkeys(_LEFT)
    for _ in range(_ROUNDS):
        offload_s.append(seconds_of(lender.offload))
        if on_gpu:
            left = _left_on_device()
        resident.append(_resident_gib())
        pinned.append(_pinned_gib())
        onload_s.append(seconds_of(lender.onload))
    storages = actor._offload if on_gpu else lender
    assert isinstance(storages, StorageOffload)
    # Gradients are dropped: what travels is less than what is lent.
    moved = sum(storage.nbytes() for storage in storages._storages.values())
    again = actor.log_probs(microbatches)[0]
    return values | {
        "num_bytes": storages.num_bytes,
        "moved_bytes": moved,
        "offload_s": [round(value, 5) for value in offload_s],
        "onload_s": [round(value, 5) for value in onload_s],
        "offload_gb_per_s": [round(moved / value / 1e9, 3) for value in offload_s],
        "onload_gb_per_s": [round(moved / value / 1e9, 3) for value in onload_s],
        **left,
        "host_rss_gib": resident,
        "pinned_gib": pinned if on_gpu else None,
        "log_probs_unchanged": torch.equal(log_probs, again),
    }


_OF_CACHE = ("reserved_gib_after_update", "reserved_gib_after_empty_cache", "empty_cache_s")
_LEFT = ("allocated_gib_offloaded", "reserved_gib_offloaded", "used_gib_offloaded")


def _storages(actor: Actor) -> StorageOffload:
    return StorageOffload(actor._lasting_tensors(), actor._gradient_buffers())


def _empty_cache() -> dict[str, float]:
    """GiB that the allocator holds after an update, and after giving back unused memory; seconds of giving it back."""
    gc.collect()
    before = torch.cuda.memory_reserved()
    spent = seconds_of(torch.cuda.empty_cache)
    return dict(zip(_OF_CACHE, (gib(before), gib(torch.cuda.memory_reserved()), round(spent, 5)), strict=True))


def _left_on_device() -> dict[str, float | None]:
    """GiB used by tensors, held by the allocator, and taken on the whole device, by contexts and others as well."""
    free, total = torch.cuda.mem_get_info()
    numbers = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), total - free)
    return {name: gib(number) for name, number in zip(_LEFT, numbers, strict=True)}


def _resident_gib() -> float:
    return gib(status_bytes("VmRSS"))


def _pinned_gib() -> float | None:
    """GiB of host memory that torch's allocator has pinned, in use or kept for reuse."""
    if not torch.cuda.is_available():
        return None
    return gib(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))
