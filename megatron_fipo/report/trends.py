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
        first, last: means over the first and the last third.
        change: last minus first, with its 95 % interval.
        num_steps: steps in each third.
    """

    first: float
    last: float
    change: Interval
    num_steps: int

    @property
    def rises(self) -> bool:
        return self.change.is_above

    @property
    def falls(self) -> bool:
        return self.change.is_below


def trend(table: MetricTable, name: str) -> Trend | None:
    """The trend of a metric; None where too few steps have a value."""
    values = table.values(name)
    if len(values) < LEAST_STEPS:
        return None
    size = len(values) // 3
    first, last = values[:size], values[-size:]
    return Trend(float(np.mean(first)), float(np.mean(last)), difference_interval(last, first), size)


def recent(table: MetricTable, name: str) -> float | None:
    """Mean over the last third of the steps that have a value, one at least; None where none has."""
    values = table.values(name)
    return float(np.mean(values[-max(len(values) // 3, 1) :])) if values else None
