"""The process that runs a part's cases, one after the other, each noted in the report before the next begins."""

from __future__ import annotations

import gc
import importlib
import os
import sys
import time
import traceback
from typing import Any

from benchmarks.evidence.report import DONE, FAILED, PENDING, RUNNING, SKIPPED, Report, Settings, SkipCase

EXIT_START_AGAIN = 75
"""Exit code of a process that can run no further case, since a CUDA error has spoilt its context; a new one could."""
_REASON_CHARACTERS = 3000


def run_part(settings: Settings) -> None:
    """Run the cases that are pending. Ends the process with EXIT_START_AGAIN where another one has to continue."""
    from megatron_fipo import (
        cuda_start,  # noqa: F401 - before the packages that start CUDA
        quiet,  # noqa: F401 - before the packages that it silences
    )

    # isort: split
    import torch

    from benchmarks.evidence import machine
    from megatron_fipo.parallel import cpu
    from megatron_fipo.parallel.device_memory import prefer_expandable_segments

    if settings.device == "cpu":
        torch.set_num_threads(1)
    cpu.install()
    prefer_expandable_segments()  # as training does
    part = importlib.import_module(f"benchmarks.evidence.part_{settings.part}")
    report = Report.read(settings.path)
    if report.content["hardware"] is None:
        report.content |= {
            "hardware": machine.hardware(settings.device),
            "software": machine.software(),
            "git": machine.git_state(),
        }
        report.plan(part.case_names(settings))
    with part.prepared(settings) as context:
        for case in report.with_status(PENDING):
            if settings.left_s <= 0:
                case |= {"status": SKIPPED, "reason": f"the budget of {settings.budget_s:.0f} s was used up"}
                report.write()
                continue
            error = _run_case(part, context, case, report, settings)
            gc.collect()
            if torch.cuda.is_available() and not _spoils_context(error):
                torch.cuda.empty_cache()
            if _spoils_context(error):
                sys.stdout.flush()
                os._exit(EXIT_START_AGAIN)  # tearing a spoilt context down can hang


def _run_case(
    part: Any, context: Any, case: dict[str, Any], report: Report, settings: Settings
) -> BaseException | None:
    case["status"] = RUNNING
    report.write()
    start = time.perf_counter()
    print(f"{settings.name}: {case['name']} …", flush=True)
    error: BaseException | None = None
    try:
        case["values"] = part.run_case(case["name"], context, settings)
        case["status"] = DONE
    except SkipCase as reason:
        case |= {"status": SKIPPED, "reason": str(reason)}
    except Exception as raised:  # noqa: BLE001 - whatever fails is this case's result, and the next one's turn comes
        error = raised
        case |= {"status": FAILED, "reason": traceback.format_exc()[-_REASON_CHARACTERS:]}
        error.__traceback__ = None  # its frames hold the case's tensors
    case["seconds"] = round(time.perf_counter() - start, 2)
    report.content["seconds"] = round(time.time() - settings.started_at, 1)
    if backends := getattr(context, "backends", None):
        report.content["backends"] = backends
    report.write()
    print(f"{settings.name}: {case['name']}: {_in_words(case)}", flush=True)
    return error


def _in_words(case: dict[str, Any]) -> str:
    if case["status"] == DONE:
        numbers = {key: value for key, value in case["values"].items() if isinstance(value, (int, float))}
        return f"{case['seconds']:.1f} s; " + ", ".join(f"{key} {value:.6g}" for key, value in numbers.items())
    last_line = case["reason"].strip().splitlines()[-1]
    return f"{case['status']}: {last_line}"


def _spoils_context(error: BaseException | None) -> bool:
    """Whether CUDA gives this process nothing but errors from now on; running out of memory does not."""
    if error is None:
        return False
    text = str(error)
    return "CUDA error" in text and "out of memory" not in text
