"""Reads metrics.jsonl: a column for each metric, a row for each step.

A step of training stands where the file has it. The scores of an evaluation stand at the number of steps that were done
before it: 0 before training, the number of all steps at the end. The file gives an evaluation in between the step that
it follows, which is one less.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

EVALUATION = "evaluation/"
"""How the names of an evaluation's scores begin."""


@dataclass(frozen=True)
class MetricTable:
    """The metrics of a run.

    Attributes:
        steps: every step that has a number, ascending.
        columns: by metric, its value at each of the steps; None where it has none.
        training_steps: the steps that were trained.
        evaluated_steps: how many steps were done before each evaluation.
        has_last_scores: whether the evaluation after the last step, which ends a run, is among them.
    """

    steps: tuple[int, ...]
    columns: dict[str, list[float | None]]
    training_steps: tuple[int, ...]
    evaluated_steps: tuple[int, ...]
    has_last_scores: bool

    @property
    def num_steps_done(self) -> int:
        """Steps of training that are finished."""
        return self.training_steps[-1] + 1 if self.training_steps else 0

    def values(self, name: str) -> list[float]:
        """What a metric has measured, in the order of the steps; empty where the run has no such metric."""
        return [value for value in self.columns.get(name, ()) if value is not None]

    def at(self, name: str, step: int) -> float | None:
        """A metric's value at a step that the table has."""
        column = self.columns.get(name)
        return None if column is None else column[self._places[step]]

    @cached_property
    def _places(self) -> dict[int, int]:
        """Row of each step: of a long run, looking for it step by step would take minutes."""
        return {step: place for place, step in enumerate(self.steps)}


def read_metrics(path: Path) -> MetricTable:
    """Read the file, which a run may be writing. One that is not there yet has no steps.

    Raises:
        ValueError: if a line is damaged, unless it is the last one and was torn as it was written.
    """
    rows: dict[int, dict[str, float | None]] = {}
    trained: set[int] = set()
    evaluated: set[int] = set()
    has_last_scores = False
    for step, numbers in _lines(path):
        if all(name.startswith(EVALUATION) for name in numbers):
            if not numbers:
                continue  # an evaluation without sources
            has_last_scores = bool(trained) and step not in trained
            step += step in trained
            evaluated.add(step)
        else:
            trained.add(step)
            has_last_scores = False
        rows.setdefault(step, {}).update(numbers)
    steps = tuple(sorted(rows))
    names = dict.fromkeys(name for step in steps for name in rows[step])
    columns = {name: [rows[step].get(name) for step in steps] for name in names}
    return MetricTable(steps, columns, tuple(sorted(trained)), tuple(sorted(evaluated)), has_last_scores)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, float | None]]]:
    """(step, numbers by name) of each line."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}.") from error
    lines = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        is_torn = number == len(lines)  # what follows the last end of a line
        if not line and is_torn:
            return
        try:
            record = json.loads(line)
            step = record.pop("step")
            if type(step) is not int or step < 0:
                raise ValueError(f"its step is {step!r}")
            numbers = {name: _number(name, value) for name, value in record.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            if is_torn:
                return
            raise ValueError(
                f"{path}, line {number} is no line of metrics ({error}). The file was damaged or edited; mend or "
                "remove the line."
            ) from error
        yield step, numbers


def _number(name: str, value: object) -> float | None:
    if value is None:
        return None
    if type(value) not in (int, float):
        raise ValueError(f"{name} is {value!r}")
    assert isinstance(value, (int, float))
    return float(value) if math.isfinite(value) else None
