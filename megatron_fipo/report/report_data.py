"""The data of a report's page: one JSON object of everything but the tokens of traced responses.

Numbers that are not finite are null there. All texts are data, which the page never takes for markup.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo import __version__
from megatron_fipo.analysis.of_run import Analysis
from megatron_fipo.report.axes import flops_before, tokens_before
from megatron_fipo.report.comparison import compare
from megatron_fipo.report.credit import Credit, read_credit
from megatron_fipo.report.figure import Figure, found_figures, plain
from megatron_fipo.report.figures import FIGURES, SECTIONS
from megatron_fipo.report.finding import Finding
from megatron_fipo.report.run_data import RunData, evaluated_sources
from megatron_fipo.report.shown_samples import shown_samples
from megatron_fipo.report.verdict import verdict
from megatron_fipo.report.written_config import without_credentials, written_config

FORMAT = 1
"""Version of the object."""
PHASES = ("rollout", "handover_to_training", "old_log_probs", "update", "weight_sync")
"""Phases of a step, which follow each other; time_s/step is the whole."""
OTHER = "other"
_DIGITS = 8
"""Significant digits of a number on the page."""


@dataclass(frozen=True)
class Report:
    """A report.

    Attributes:
        data: the JSON object.
        tokens: token data of traced responses, by the id that `data` gives.
        num_traced, num_shown: traced responses that there are, and those that the report holds.
    """

    data: dict[str, Any]
    tokens: dict[str, dict[str, Any]]
    num_traced: int
    num_shown: int


def make_report(
    runs: Sequence[RunData], analyses: Sequence[Analysis], max_trace_tokens: int, *, is_live: bool = False
) -> Report:
    """Make the report of some runs.

    Args:
        runs: at least one.
        analyses: what each run's responses consist of.
        max_trace_tokens: tokens of traces to show of all runs together.
        is_live: whether the page is to ask for newer data.

    Raises:
        ValueError: if a file of a run is damaged.
    """
    with_traces = sum((run.folder / "traces").is_dir() for run in runs) or 1
    credits_ = [
        read_credit(run.folder / "traces", max_trace_tokens // with_traces, f"r{place}")
        for place, run in enumerate(runs)
    ]
    names = dict.fromkeys(
        name
        for run in runs
        for name, column in run.metrics.columns.items()
        if any(value is not None for value in column)
    )
    figures = found_figures(FIGURES, names)
    configs = [written_config(run.config) for run in runs]
    used = {figure.section for figure in figures}
    data = {
        "format": FORMAT,
        "title": _title(runs),
        "written_at": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "is_live": is_live,
        "sections": [plain(section) for section in SECTIONS if section.id in used],
        "figures": [plain(figure) for figure in figures],
        "runs": [
            _run(run, place, label, config, credit, analysis, figures)
            for place, (run, label, config, credit, analysis) in enumerate(
                zip(runs, _labels(runs), configs, credits_, analyses, strict=True)
            )
        ],
        "comparison": compare(runs, configs),
    }
    return Report(
        data=_finite(data),
        tokens={key: tokens for credit in credits_ for key, tokens in credit.tokens.items()},
        num_traced=sum(credit.num_responses for credit in credits_),
        num_shown=sum(credit.num_shown for credit in credits_),
    )


def _title(runs: Sequence[RunData]) -> str:
    names = list(dict.fromkeys(run.name for run in runs))
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} and {len(names) - 2} more"


def _labels(runs: Sequence[RunData]) -> list[str]:
    """What tells the runs from each other: algorithm and seed, and the name where that is not enough."""
    labels = [f"{run.algorithm or run.name}, seed {run.seed}" for run in runs]
    return [
        label if labels.count(label) == 1 else f"{label} ({run.name})" for label, run in zip(labels, runs, strict=True)
    ]


def _run(
    run: RunData,
    place: int,
    label: str,
    config: Mapping[str, Any],
    credit: Credit,
    analysis: Analysis,
    figures: Sequence[Figure],
) -> dict[str, Any]:
    table, findings = run.metrics, verdict(run)
    flops, reason = flops_before(run)
    names = _used_metrics(figures, findings)
    return {
        "id": f"r{place}",
        "name": run.name,
        "label": label,
        "algorithm": run.algorithm,
        "seed": run.seed,
        "state": "finished" if run.is_finished else "unfinished",
        "num_steps": run.num_steps,
        "verdict": [finding.plain() for finding in findings],
        "steps": list(table.steps),
        "metrics": {name: column for name, column in table.columns.items() if name in names},
        "axes": {"tokens": tokens_before(run), "flops": flops, "flops_note": reason},
        "evaluations": _evaluations(run),
        "time": _time(run),
        "samples": shown_samples(run),
        "analysis": analysis.to_plain() if analysis.points else None,
        "objective": {
            key.removeprefix("objective."): value for key, value in config.items() if key.startswith("objective.")
        },
        "groups": credit.groups,
        "traces": {"num_responses": credit.num_responses, "num_left_out": credit.num_left_out},
        "config": dict(config),
        "provenance": _without_secrets(run.provenance),
    }


def _without_secrets(value: Any) -> Any:
    """The same without credentials in its texts: places of models and data may be URLs."""
    if isinstance(value, str):
        return without_credentials(value)
    if isinstance(value, Mapping):
        return {key: _without_secrets(item) for key, item in value.items()}
    return [_without_secrets(item) for item in value] if isinstance(value, (list, tuple)) else value


def _used_metrics(figures: Sequence[Figure], findings: Sequence[Finding]) -> set[str]:
    return {line.metric for figure in figures for line in figure.lines} | {
        name for finding in findings for name in finding.metrics
    }


def _evaluations(run: RunData) -> list[dict[str, Any]]:
    """The scores of each evaluation, in order of steps and sources."""
    table, found = run.metrics, []
    for step in table.evaluated_steps:
        for source, k in evaluated_sources(table):
            base = f"evaluation/{source}"
            if table.at(f"{base}/avg@{k}", step) is None:
                continue
            scores = {
                "avg": f"{base}/avg@{k}",
                "low": f"{base}/avg@{k}_ci95_low",
                "high": f"{base}/avg@{k}_ci95_high",
                "cons": f"{base}/cons@{k}",
                "pass": f"{base}/pass@{k}",
                "response_tokens": f"{base}/response_tokens/mean",
            }
            numbers = {name: table.at(metric, step) for name, metric in scores.items()}
            found.append({"step": step, "source": source, "k": k, **numbers})
    return found


def _time(run: RunData) -> dict[str, Any]:
    """Seconds of each phase at each step; what is left of the whole step is "other"."""
    table = run.metrics
    phases = [phase for phase in PHASES if table.values(f"time_s/{phase}")]
    seconds = [list(table.columns[f"time_s/{phase}"]) for phase in phases]
    whole = table.columns.get("time_s/step")
    if whole is None:
        return {"phases": phases, "seconds": seconds}
    rest = [
        None if total is None else max(total - sum(row[place] or 0.0 for row in seconds), 0.0)
        for place, total in enumerate(whole)
    ]
    return {"phases": [*phases, OTHER], "seconds": [*seconds, rest]}


def _finite(value: Any) -> Any:
    """The same with null in place of numbers that JSON has not, and numbers rounded to what can be seen."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
