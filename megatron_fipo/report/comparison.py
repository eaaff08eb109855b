"""Several runs beside each other: runs that differ in their seed alone are a group, and groups are compared.

Two kinds of interval answer two questions. Over seeds: what would other seeds have given? Over problems: what would
other problems have given, with these runs? Each is a paired t interval; a single seed has none over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from megatron_fipo.report.run_data import RunData, evaluated_sources
from megatron_fipo.report.statistics import Interval, difference_interval, mean_interval
from megatron_fipo.report.trends import recent

NOT_COMPARED = ("run.", "metrics.", "checkpoint.", "train.resume", "evaluation.every_num_steps")
"""How keys begin that say where, how often and how much is written, and never what is learnt."""
TRAINING_SCORES = ("reward/mean", "rollout/accuracy/mean")
"""Compared by their means over the last third of the steps."""
BY_PROBLEM, BY_SEED, UNPAIRED = "problem", "seed", "nothing"
MOST_KEYS, MOST_CHARACTERS = 2, 24
"""What a label holds at most of what differs."""
_MISSING = "(missing)"


@dataclass(frozen=True)
class RunGroup:
    """Runs of one configuration, apart from the seed.

    Attributes:
        label: what tells it from the other groups.
        runs: places of its runs among all.
    """

    label: str
    runs: tuple[int, ...]


def compare(runs: Sequence[RunData], configs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The comparison as a JSON object; None for a single run.

    Args:
        runs: the runs.
        configs: their configurations as a report may show them.

    Raises:
        ValueError: if a file of an evaluation is damaged.
    """
    if len(runs) < 2:
        return None
    groups = run_groups(runs, configs)
    return {
        "groups": [{"label": group.label, "runs": list(group.runs)} for group in groups],
        "scores": [_score(metric, title, groups, values, runs) for metric, title, values in _measured(runs)],
        "config_differences": config_differences(configs),
        "note": _uneven(runs),
    }


def run_groups(runs: Sequence[RunData], configs: Sequence[Mapping[str, Any]]) -> list[RunGroup]:
    """The groups in order of their first runs; labels show what a report may show."""
    members: dict[frozenset[tuple[str, str]], list[int]] = {}
    for place, run in enumerate(runs):
        members.setdefault(frozenset((key, repr(value)) for key, value in _compared(run.config).items()), []).append(
            place
        )
    firsts = [places[0] for places in members.values()]
    labels = _labels([runs[place] for place in firsts], [configs[place] for place in firsts])
    return [RunGroup(label, tuple(places)) for label, places in zip(labels, members.values(), strict=True)]


def config_differences(configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keys whose values differ between runs, with each run's value."""
    compared = [_compared(config) for config in configs]
    keys = dict.fromkeys(key for config in compared for key in config)
    rows = [{"key": key, "values": [config.get(key, _MISSING) for config in compared]} for key in keys]
    return [row for row in rows if len(set(map(repr, row["values"]))) > 1]


def _uneven(runs: Sequence[RunData]) -> str:
    """A warning where the runs have not come equally far; empty where they have."""
    done = [run.metrics.num_steps_done for run in runs]
    if len(set(done)) == 1:
        return ""
    return f"The runs have trained {', '.join(map(str, done[:-1]))} and {done[-1]} steps: their scores are of these."


def _compared(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith(NOT_COMPARED)}


def _labels(runs: Sequence[RunData], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A label for each group: its algorithm, and where several share it, what differs, the objective's keys first."""
    labels = []
    for run, config in zip(runs, configs, strict=True):
        alike = [other for one, other in zip(runs, configs, strict=True) if one.algorithm == run.algorithm]
        differing = [
            (row["key"], _shown(config.get(row["key"], _MISSING)))
            for row in config_differences(alike)
            if len(set(map(_shown, row["values"]))) > 1
        ]
        differing.sort(key=lambda pair: not pair[0].startswith("objective."))
        parts = [f"{key.rpartition('.')[2]}={value}" for key, value in differing[:MOST_KEYS]]
        labels.append(", ".join([run.algorithm or run.name, *parts]))
    return [
        label if labels.count(label) == 1 else f"{label} ({run.name})" for label, run in zip(labels, runs, strict=True)
    ]


def _shown(value: Any) -> str:
    """A value in a label: of a path, its name."""
    text = str(value).rstrip("/").rpartition("/")[2]
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}…"


# --- scores -----------------------------------------------------------------------------------------------------------


def _measured(runs: Sequence[RunData]) -> list[tuple[str, str, list[float | None]]]:
    """(metric, title, each run's value) of what is compared; the last scores of every run, and its last training."""
    names: dict[str, str] = {}
    for run in runs:
        for source, k in evaluated_sources(run.metrics):
            names |= {f"evaluation/{source}/{kind}@{k}": f"{kind}@{k} on {source}" for kind in ("avg", "cons", "pass")}
            names[f"evaluation/{source}/response_tokens/mean"] = f"Response length on {source}"
    found: list[tuple[str, str, list[float | None]]] = [
        (name, title, [_last(run, name) for run in runs]) for name, title in names.items()
    ]
    for name in TRAINING_SCORES:
        found.append((name, f"{name}, last third of the steps", [recent(run.metrics, name) for run in runs]))
    return [one for one in found if any(value is not None for value in one[2])]


def _last(run: RunData, name: str) -> float | None:
    values = run.metrics.values(name)
    return values[-1] if values else None


def _score(
    metric: str, title: str, groups: Sequence[RunGroup], values: Sequence[float | None], runs: Sequence[RunData]
) -> dict[str, Any]:
    rows = []
    for group in groups:
        known = [value for place in group.runs if (value := values[place]) is not None]
        interval = mean_interval(known) if known else None
        rows.append({"label": group.label, **_plain(interval), "values": [values[place] for place in group.runs]})
    return {
        "metric": metric,
        "title": title,
        "groups": rows,
        "differences": [
            {"a": one.label, "b": other.label, **_plain(interval), "paired_by": paired_by, "num_pairs": num_pairs}
            for one, other in combinations(groups, 2)
            for interval, paired_by, num_pairs in _differences(metric, one, other, values, runs)
        ],
    }


def _differences(
    metric: str, one: RunGroup, other: RunGroup, values: Sequence[float | None], runs: Sequence[RunData]
) -> list[tuple[Interval, str, int]]:
    """(one minus the other, by what it is paired, number of pairs)."""
    found = []
    by_seed = [
        {runs[place].seed: value for place in group.runs if (value := values[place]) is not None}
        for group in (one, other)
    ]
    shared = [seed for seed in by_seed[0] if seed in by_seed[1] and seed is not None]
    if shared:
        differences = [by_seed[0][seed] - by_seed[1][seed] for seed in shared]
        found.append((mean_interval(differences), BY_SEED, len(shared)))
    elif by_seed[0] and by_seed[1]:
        sides = [list(side.values()) for side in by_seed]
        found.append((difference_interval(*sides), UNPAIRED, min(map(len, sides))))
    if "/avg@" in metric:
        per_problem = [_mean_by_problem(metric, [runs[place] for place in group.runs]) for group in (one, other)]
        first, second = per_problem
        if first and second and first.keys() == second.keys():
            found.append((mean_interval([first[key] - second[key] for key in first]), BY_PROBLEM, len(first)))
    return found


def _mean_by_problem(metric: str, runs: Sequence[RunData]) -> dict[tuple[int, str], float] | None:
    """Mean over runs of the newest avg@k of each problem; None unless all have judged the same problems."""
    source = metric.split("/")[1]
    scores: list[dict[tuple[int, str], float]] = []
    for run in runs:
        latest = run.latest_evaluation()
        problems = run.problems(latest, source) if latest else None
        if not problems:
            return None
        scores.append({(problem.prompt_id, problem.prompt): float(np.mean(problem.correct)) for problem in problems})
    if any(one.keys() != scores[0].keys() for one in scores):
        return None
    return {key: float(np.mean([one[key] for one in scores])) for key in scores[0]}


def _plain(interval: Interval | None) -> dict[str, float | None]:
    return dict(zip(("mean", "low", "high"), interval or (None, None, None), strict=True))
