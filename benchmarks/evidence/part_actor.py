"""Log-probs and updates of a real actor: time, MFU, memory beside preflight's prediction, kernels and waits.

The 7B does not fit one GPU with its optimizer. It is built with two and with six of its 28 layers: the difference gives
the time of a layer, and that the time of them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

from benchmarks.evidence import machine, models
from benchmarks.evidence.measuring import profile
from benchmarks.evidence.models import Packing, Size
from benchmarks.evidence.report import Settings, SkipCase
from benchmarks.evidence.workbench import Workbench, workbench

_NAME = re.compile(r"(?P<size>\S+), (?P<packing>.+), (?P<layers>\d+|all) layers")


def case_names(settings: Settings) -> list[str]:
    return list(_names(settings))


def _names(settings: Settings) -> Iterator[str]:
    for name in settings.sizes or ("0.5b", "1.5b", "7b"):
        size = models.size_of(name, settings.tiny)
        for packing in models.even_packings(settings.tiny):
            for layers in size.built:
                yield f"{name}, {packing.name}, {layers} layers"
            if len(size.built) > 1:
                yield f"{name}, {packing.name}, all layers"


def prepared(settings: Settings) -> AbstractContextManager[Workbench]:
    return workbench()


def run_case(name: str, bench: Workbench, settings: Settings) -> dict[str, Any]:
    match = _NAME.fullmatch(name)
    assert match is not None
    size = models.size_of(match["size"], settings.tiny)
    packing = next(p for p in models.even_packings(settings.tiny) if p.name == match["packing"])
    if match["layers"] == "all":
        return _scaled(size, packing, bench, settings)
    layers = int(match["layers"])
    folder = models.write_folder(bench.folder / f"{size.name}-{layers}", size, layers, max(packing.lengths))
    recompute = models.fitting_recompute(folder, packing, settings.device)
    config = bench.config(size, layers, packing, recompute=recompute)
    actor = bench.build(config)
    measured = models.measure_actor(actor, config, size, packing, settings)
    bench.note(measured.values)
    loss = models.loss_of(config, bench.ranks)
    found = profile(lambda: actor.update(measured.microbatches, loss, 1), settings.device)
    values = {"kind": "actor", **measured.values, **found.values()}
    bench.kept[f"{size.name} {packing.name} {layers}"] = values
    return values


def _scaled(size: Size, packing: Packing, bench: Workbench, settings: Settings) -> dict[str, Any]:
    """Time of all layers, extrapolated from two cuts as if they fitted into the GPU's memory."""
    parts = [bench.kept.get(f"{size.name} {packing.name} {layers}") for layers in size.built]
    few, many = parts[0], parts[-1]
    if few is None or many is None:
        raise SkipCase(f"it needs the cases of {' and '.join(map(str, size.built))} layers from the same process")
    added = size.built[-1] - size.built[0]
    per_layer = {key: (many[key] - few[key]) / added for key in ("log_probs_ms", "update_ms", "update_tflop")}
    missing = size.layers - size.built[-1]
    whole = {key: many[key] + missing * value for key, value in per_layer.items()}
    gpu = machine.known_gpu(settings.device)
    return {
        "kind": "scaled",
        "model": size.name,
        "layers": many["layers"],
        "attention": many["attention"],
        "packing": packing.name,
        "tokens": packing.tokens,
        "layers_built": list(size.built),
        "layers_whole": size.layers,
        "log_probs_ms_per_layer": round(per_layer["log_probs_ms"], 4),
        "update_ms_per_layer": round(per_layer["update_ms"], 4),
        "whole_log_probs_ms": round(whole["log_probs_ms"], 3),
        "whole_update_ms": round(whole["update_ms"], 3),
        "whole_tokens_per_s": round(packing.tokens / (whole["update_ms"] / 1e3), 1),
        "whole_mfu": round(whole["update_tflop"] / (whole["update_ms"] / 1e3) * 1e12 / gpu.peak_flops, 4)
        if gpu
        else None,
    }
