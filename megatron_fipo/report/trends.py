"""How a metric moves over a run: its first third of steps against its last.

Steps count as independent, which they are as far as their noise comes from what was sampled. An interval that reaches
over 0 says that the change cannot be told from noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_fipo.report.metrics_file import MetricTable
from megatron_fipo.report.statistics import Interval, difference_interval

LEAST_STEPS = 6
"""Steps with a value that a trend needs: two in each third."""


@dataclass(frozen=True)
class Trend:
    """A metric at the beginning and at the end.

    Attributes:
        first, middle, last: means over the thirds.
        change: last minus first, with its 95 % interval.
        early_change, late_change: middle minus first, and last minus middle, with theirs.
        num_steps: steps in the first and in the last third; the middle one has what is between.
    """

    first: float
    middle: float
    last: float
    change: Interval
    early_change: Interval
    late_change: Interval
    num_steps: int

    @property
    def rises(self) -> bool:
        return self.change.is_above or (_is_without_noise(self.change) and self.change.mean > 0)

    @property
    def falls(self) -> bool:
        return self.change.is_below or (_is_without_noise(self.change) and self.change.mean < 0)


def _is_without_noise(change: Interval) -> bool:
    """Whether neither third varies: a mean of many responses that is the same at each step has moved if it differs."""
    return change.low is None


def trend(table: MetricTable, name: str) -> Trend | None:
    """The trend of a metric; None where too few steps have a value."""
    values = table.values(name)
    if len(values) < LEAST_STEPS:
        return None
    size = len(values) // 3
    first, middle, last = values[:size], values[size:-size], values[-size:]
    return Trend(
        first=float(np.mean(first)),
        middle=float(np.mean(middle)),
        last=float(np.mean(last)),
        change=difference_interval(last, first),
        early_change=difference_interval(middle, first),
        late_change=difference_interval(last, middle),
        num_steps=size,
    )


def recent(table: MetricTable, name: str) -> float | None:
    """Mean over the last third of the steps that have a value, one at least; None where none has."""
    values = table.values(name)
    return float(np.mean(values[-max(len(values) // 3, 1) :])) if values else None
