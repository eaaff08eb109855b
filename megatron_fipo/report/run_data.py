"""What a run has written into its folder, read for the report, also while the run goes on.

Nothing of torch is imported: a report opens at once on a laptop to which the folder was copied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_fipo.config.text_files import read_text
from megatron_fipo.config.yaml_values import read_yaml
from megatron_fipo.evaluation.scores import ProblemResult
from megatron_fipo.report.metrics_file import EVALUATION, MetricTable, read_metrics
from megatron_fipo.report.written_config import flat_values

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class RunData:
    """A run.

    Attributes:
        folder: where it lies.
        config: its configuration by dotted keys, as it stands in the file: with whatever secrets stand there.
        provenance: revision and versions.
        metrics: its numbers.
    """

    folder: Path
    config: Mapping[str, Any]
    provenance: Mapping[str, Any]
    metrics: MetricTable

    @property
    def name(self) -> str:
        return str(self.config.get("run.name") or self.folder.name)

    @property
    def algorithm(self) -> str:
        return str(self.config.get("algorithm", ""))

    @property
    def seed(self) -> int | None:
        seed = self.config.get("run.seed")
        return seed if type(seed) is int else None

    @property
    def num_steps(self) -> int:
        """Steps that it is to train."""
        return self.number("train.num_steps")

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do: all steps are trained, or a rule ended it, and the last scores are there."""
        return (
            self.metrics.has_last_scores if self.evaluation_sources else self.metrics.num_steps_done >= self.num_steps
        )

    @cached_property
    def evaluation_sources(self) -> tuple[str, ...]:
        """Names of the held-out sources, in order."""
        return tuple(dict.fromkeys(key.split(".")[2] for key in self.config if re.match(r"data\.evaluation\..", key)))

    def number(self, key: str) -> int:
        """A whole number of the configuration.

        Raises:
            ValueError: if it is none.
        """
        value = self.config.get(key)
        if type(value) is not int:
            raise ValueError(
                f"{self.folder / 'config.yaml'}: {key}={value!r} is no whole number. A run writes one there; the file "
                "was damaged, edited, or is of another program."
            )
        return value

    def latest_evaluation(self) -> str | None:
        """The newest evaluation after training has begun, as its files are called; None without one.

        It is the one of the newest scores. There may be files of later steps: of a run that was resumed before them, or
        of the end of one that goes on with more steps.
        """
        if self.metrics.has_last_scores:
            return AFTER
        steps = [step for step in self.metrics.evaluated_steps if step > 0]
        return f"step_{steps[-1]:06d}" if steps else None

    def problems(self, when: str, source: str) -> list[ProblemResult] | None:
        """The judged problems of an evaluation; None where it has written none.

        Raises:
            ValueError: if the file is damaged.
        """
        path = self.folder / "evaluation" / f"{when}_{source}.jsonl"
        return _read_problems(path) if path.is_file() else None


def read_run(folder: str | Path) -> RunData:
    """Read a run's folder. Evaluations and samples are read when they are asked for.

    Raises:
        ValueError: if it is no run's folder, or a file is damaged.
    """
    root = Path(folder)
    if not root.is_dir():
        nearby = Path("outputs") / folder
        hint = f" Did you mean {nearby}?" if nearby.is_dir() else ""
        raise ValueError(f"{folder} is no folder here. Name the folder of a run, such as outputs/my_run.{hint}")
    path = root / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{folder} does not look like the folder of a run: it has no config.yaml. Name the folder that "
            "run.output_dir says."
        )
    config = read_yaml(read_text(path, "configuration of a run"), Any, str(path))
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no configuration of a run, but {type(config).__name__}.")
    provenance = root / "provenance.json"
    return RunData(
        folder=root,
        config=flat_values(config),
        provenance=_read_json_object(provenance) if provenance.is_file() else {},
        metrics=read_metrics(root / "metrics.jsonl"),
    )


def read_runs(folders: Sequence[str]) -> list[RunData]:
    """Read several runs.

    Raises:
        ValueError: if a folder is no run's, or is given twice.
    """
    places = [Path(folder).resolve() for folder in folders]
    for folder, place in zip(folders, places, strict=True):
        if places.count(place) > 1:
            raise ValueError(f"{folder} is given twice. Give each run once.")
    return [read_run(folder) for folder in folders]


def read_measured_runs(folders: Sequence[str]) -> list[RunData]:
    """Read runs that have something to report.

    Raises:
        ValueError: if a folder is no run's, is given twice, or has no numbers.
    """
    runs = read_runs(folders)
    for run in runs:
        if not run.metrics.steps:
            raise ValueError(
                f"{run.folder / 'metrics.jsonl'} holds no numbers: the run has finished no step yet, or "
                "metrics.jsonl=false keeps it from writing them. Wait for its first step, or leave it out."
            )
    return runs


def evaluated_sources(metrics: MetricTable) -> list[tuple[str, int]]:
    """(source, k) of the scores that there are, in order."""
    found = [re.fullmatch(rf"{EVALUATION}(.+)/avg@(\d+)", name) for name in metrics.columns]
    return [(match[1], int(match[2])) for match in found if match]


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="backslashreplace"))
        if not isinstance(value, dict):
            raise ValueError(f"an object was expected, not {type(value).__name__}")
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. The file was damaged or edited. Restore it from a copy, or remove it: "
            "the report does without."
        ) from error
    return value


def _read_problems(path: Path) -> list[ProblemResult]:
    problems = []
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            problems.append(_problem(json.loads(line)))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number} is no judged problem ({error}). The file was damaged or edited; evaluate "
                "again, or remove it."
            ) from error
    return problems


def _problem(row: Mapping[str, Any]) -> ProblemResult:
    values: dict[str, Any] = {
        field.name: tuple(row[field.name]) if field.type.startswith("tuple") else row[field.name]
        for field in fields(ProblemResult)
        if isinstance(field.type, str) and (field.name != "parts" or field.name in row)
    }
    problem = ProblemResult(**values)
    _check(problem.correct, bool, "correct")
    _check(problem.response_tokens, int, "response_tokens")
    for name in ("responses", "answers", "finish_reasons", "errors"):
        _check(getattr(problem, name), str, name)
    for name in ("source", "prompt", "reference"):
        _check((getattr(problem, name),), str, name)
    counts = {name: len(values[name]) for name in ("responses", "correct", "answers", "response_tokens")}
    if len(set(counts.values())) != 1 or not problem.correct:
        raise ValueError(f"every response needs a verdict, an answer and a length; there are {counts}")
    return problem


def _check(values: Sequence[object], kind: type, name: str) -> None:
    if wrong := [value for value in values if type(value) is not kind]:
        raise ValueError(f"{name} holds {wrong[0]!r}")
