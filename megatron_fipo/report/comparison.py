"""Several runs beside each other: runs that differ in their seed alone are a group, and groups are compared.

Two kinds of interval answer two questions. Over seeds: what would other seeds have given? Over problems: what would
other problems have given, with these runs? Each is a paired t interval; a single seed has none over seeds.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np

from megatron_fipo.report.run_data import RunData, evaluated_sources
from megatron_fipo.report.statistics import Interval, difference_interval, mean_interval
from megatron_fipo.report.trends import recent

NOT_COMPARED = ("run.", "metrics.", "checkpoint.", "train.resume", "evaluation.every_num_steps", "objective.shadow")
"""How keys begin that say where, how often and how much is measured and written, and never what is learnt."""
TRAINING_SCORES = ("reward/mean", "rollout/accuracy/mean")
"""Compared by their means over the last third of the steps."""
BY_PROBLEM, BY_SEED, UNPAIRED = "problem", "seed", "nothing"
MOST_KEYS, MOST_CHARACTERS = 2, 24
"""What a label holds at most of what differs."""
MOST_NAMED = 4
"""Keys that a warning names."""
LEAST_PAIRS = 2
"""Seeds that two groups need to share to be paired by them, unless they have no others."""
_MISSING = "(missing)"

Problem: TypeAlias = tuple[int, str]
"""A problem by the number of its prompt and the prompt."""


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
        "note": " ".join(filter(None, (_uneven(runs), *_unlike([run.config for run in runs])))),
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
    if len(set(done)) > 1:
        return (
            f"The runs have trained {', '.join(map(str, done[:-1]))} and {done[-1]} steps: their scores are of these."
        )
    evaluated = [run.metrics.evaluated_steps[-1] for run in runs if run.metrics.evaluated_steps]
    if len(set(evaluated)) > 1:
        steps = f"{', '.join(map(str, evaluated[:-1]))} and {evaluated[-1]}"
        return f"The newest held-out scores are of {steps} steps of training."
    return ""


def _unlike(configs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warnings where scores of the same name were not measured alike."""
    held_out = [row["key"] for row in config_differences(configs) if row["key"].startswith("evaluation.")]
    for begins in _evaluated(configs):
        having = [config for config in configs if any(key.startswith(begins) for key in config)]
        held_out += [row["key"] for row in config_differences(having) if row["key"].startswith(begins)]
    if held_out:
        yield f"The runs' held-out scores are not of like evaluations, for these differ: {_some(held_out)}."
    training = [row["key"] for row in config_differences(configs) if row["key"].startswith(("data.train.", "reward."))]
    if training:
        yield f"The runs' rewards in training are not of like data and rules, for these differ: {_some(training)}."


def _evaluated(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How the keys of each held-out source begin."""
    found = [re.match(r"data\.evaluation\.[^.]+\.", key) for config in configs for key in config]
    return list(dict.fromkeys(match[0] for match in found if match))


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:MOST_NAMED])
    return shown if len(keys) <= MOST_NAMED else f"{shown} and {len(keys) - MOST_NAMED} more"


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
        known = _by_seed(group, values, runs)
        interval = mean_interval(list(known.values())) if known else None
        rows.append({"label": group.label, **_plain(interval), "values": [values[place] for place in group.runs]})
    # Of each group once: files of evaluations are large.
    by_problem = [_mean_by_problem(metric, group, values, runs) for group in groups]
    return {
        "metric": metric,
        "title": title,
        "groups": rows,
        "differences": [
            {"a": one.label, "b": other.label, **_plain(interval), "paired_by": paired_by, "num_pairs": num_pairs}
            for (one, first), (other, second) in combinations(zip(groups, by_problem, strict=True), 2)
            for interval, paired_by, num_pairs in _differences(
                _by_seed(one, values, runs), _by_seed(other, values, runs), first, second
            )
        ],
    }


def _differences(
    by_seed: Mapping[str, float],
    other_by_seed: Mapping[str, float],
    by_problem: Mapping[Problem, float] | None,
    other_by_problem: Mapping[Problem, float] | None,
) -> list[tuple[Interval, str, int]]:
    """(one minus the other, by what it is paired, number of pairs)."""
    found = []
    shared = [seed for seed in by_seed if seed in other_by_seed]
    if len(shared) >= LEAST_PAIRS or (shared and by_seed.keys() == other_by_seed.keys()):
        differences = [by_seed[seed] - other_by_seed[seed] for seed in shared]
        found.append((mean_interval(differences), BY_SEED, len(shared)))
    elif by_seed and other_by_seed:
        sides = list(by_seed.values()), list(other_by_seed.values())
        found.append((difference_interval(*sides), UNPAIRED, min(map(len, sides))))
    if by_problem and other_by_problem and by_problem.keys() == other_by_problem.keys():
        differences = [by_problem[problem] - other_by_problem[problem] for problem in by_problem]
        found.append((mean_interval(differences), BY_PROBLEM, len(differences)))
    return found


def _by_seed(group: RunGroup, values: Sequence[float | None], runs: Sequence[RunData]) -> dict[str, float]:
    """Mean of each seed's runs: a seed that was run twice is no second seed. A run without a seed stands for itself."""
    found: dict[str, list[float]] = {}
    for place in group.runs:
        if (value := values[place]) is not None:
            seed = runs[place].seed
            found.setdefault(f"run {place}" if seed is None else f"seed {seed}", []).append(value)
    return {seed: float(np.mean(of_seed)) for seed, of_seed in found.items()}


def _mean_by_problem(
    metric: str, group: RunGroup, values: Sequence[float | None], runs: Sequence[RunData]
) -> dict[Problem, float] | None:
    """Mean over a group's runs of the newest avg@k of each problem.

    None of another metric, and unless all runs have the metric and have judged the same problems.
    """
    if "/avg@" not in metric or any(values[place] is None for place in group.runs):
        return None
    source = metric.split("/")[1]
    scores: list[dict[Problem, float]] = []
    for run in (runs[place] for place in group.runs):
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
