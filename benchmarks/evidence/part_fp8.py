"""FP8 beside bfloat16: time, memory, and how far log-probs and gradients move."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from benchmarks.evidence import models
from benchmarks.evidence.models import Measured, Size
from benchmarks.evidence.report import Settings, SkipCase
from benchmarks.evidence.workbench import Workbench, workbench
from megatron_fipo.actor.precision import check_fp8

_RECIPES = ("none", "tensorwise", "blockwise")


def case_names(settings: Settings) -> list[str]:
    return [f"{size}: {recipe}" for size in settings.sizes or ("7b", "1.5b") for recipe in _RECIPES]


def prepared(settings: Settings) -> AbstractContextManager[Workbench]:
    return workbench()


def run_case(name: str, bench: Workbench, settings: Settings) -> dict[str, Any]:
    size_name, _, recipe = name.partition(": ")
    size = models.size_of(size_name, settings.tiny)
    try:
        check_fp8(recipe)
    except ValueError as error:
        raise SkipCase(str(error)) from None
    if size.name not in bench.kept:
        bench.kept[size.name] = _measure("none", size, bench, settings)
    base: Measured = bench.kept[size.name]
    measured = base if recipe == "none" else _measure(recipe, size, bench, settings)
    return {"kind": "fp8", **measured.values, **models.against_base(measured, base)}


def _measure(recipe: str, size: Size, bench: Workbench, settings: Settings) -> Measured:
    packing, layers = models.even_packings(settings.tiny)[1], size.built[-1]
    folder = models.write_folder(bench.folder / f"{size.name}-{layers}", size, layers, max(packing.lengths))
    recompute = models.fitting_recompute(folder, packing, settings.device)
    config = bench.config(size, layers, packing, recompute=recompute, fp8=recipe)
    measured = models.measure_actor(bench.build(config), config, size, packing, settings)
    bench.note(measured.values)
    return measured
