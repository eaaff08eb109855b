"""Folders of made-up runs, as a run writes them, for tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_fipo.evaluation.scores import ProblemResult, write_problems

CONFIG: dict[str, Any] = {
    "algorithm": "fipo",
    "run": {"name": "made_up", "output_dir": "somewhere", "seed": 0},
    "model": {"path": "/no/such/folder"},
    "data": {"train": {"chains": {"kind": "jsonl"}}, "evaluation": {"held_out": {"kind": "jsonl"}}},
    "rollout": {"num_samples_per_prompt": 4, "max_staleness_steps": 0},
    "sampling": {"max_generation_rounds": 10},
    "objective": {
        "future_kl": True,
        "half_life_tokens": 32.0,
        "influence_min": 0.8,
        "influence_max": 1.2,
        "kl_coefficient": 0.0,
        "old_log_probs": "actor",
    },
    "train": {"num_steps": 6, "num_epochs": 2, "resume": False},
}


def write_run(
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
    changes: Mapping[str, Any] | None = None,
    *,
    problems: Mapping[str, Sequence[ProblemResult]] | None = None,
) -> Path:
    """A run's folder.

    Args:
        lines: of metrics.jsonl.
        changes: to `CONFIG`, by dotted key.
        problems: evaluations by file name without its ending, such as "before_held_out".
    """
    config = json.loads(json.dumps(CONFIG))
    for key, value in (changes or {}).items():
        *sections, name = key.split(".")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for name, rows in (problems or {}).items():
        write_problems(folder / "evaluation" / f"{name}.jsonl", rows)
        (folder / "evaluation" / f"{name.removesuffix('_held_out')}.json").write_text("{}", encoding="utf-8")
    return folder


def training_lines(**columns: Sequence[float | None]) -> list[dict[str, Any]]:
    """A line for each step; "__" in a keyword stands for the slash of a metric's name."""
    names = {name.replace("__", "/"): values for name, values in columns.items()}
    length = max(map(len, names.values()))
    return [
        {"step": step, **{name: values[step] for name, values in names.items() if step < len(values)}}
        for step in range(length)
    ]


def scores_line(step: int, avg: float, k: int = 2) -> dict[str, Any]:
    """The line of an evaluation."""
    base = "evaluation/held_out"
    return {
        "step": step,
        f"{base}/avg@{k}": avg,
        f"{base}/avg@{k}_ci95_low": avg - 0.1,
        f"{base}/avg@{k}_ci95_high": avg + 0.1,
        f"{base}/cons@{k}": avg,
        f"{base}/pass@{k}": avg,
        f"{base}/response_tokens/mean": 5.0,
    }


PROBLEM = ProblemResult(
    source="held_out",
    prompt_id=0,
    prompt="1+1=",
    reference="2",
    responses=("2", "3"),
    correct=(True, False),
    scores=(1.0, 0.0),
    answers=("2", "3"),
    response_tokens=(1, 1),
    finish_reasons=("stop", "stop"),
    errors=("", ""),
)


def judged(*rights: Sequence[int]) -> list[ProblemResult]:
    """A problem for each argument, whose responses are right where it says 1."""
    return [
        replace(
            PROBLEM,
            prompt_id=place,
            prompt=f"{place}+1=",
            responses=tuple("yes" if right else "no" for right in verdicts),
            correct=tuple(map(bool, verdicts)),
            scores=tuple(float(right) for right in verdicts),
            answers=tuple("yes" if right else "no" for right in verdicts),
            response_tokens=(1,) * len(verdicts),
            finish_reasons=("stop",) * len(verdicts),
            errors=("",) * len(verdicts),
        )
        for place, verdicts in enumerate(rights)
    ]
