"""Means with 95 % confidence intervals, by Student's t: of a few values, of a difference, of pairs.

An interval needs two values at least; of one there is a mean, and None for its ends.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
MOST_DEGREES = 1000
"""Degrees of freedom beyond which the quantile is that of so many: it changes by less than 0.1 %."""


class Interval(NamedTuple):
    """A mean with the ends of its interval; None where there is none."""

    mean: float
    low: float | None
    high: float | None

    @property
    def is_above(self) -> bool:
        """Whether all of it lies above 0."""
        return self.low is not None and self.low > 0

    @property
    def is_below(self) -> bool:
        """Whether all of it lies below 0."""
        return self.high is not None and self.high < 0


def mean_interval(values: Sequence[float]) -> Interval:
    """The mean of independent values; of differences within pairs it is the paired t interval.

    Values that are all the same say nothing of their spread, and have no interval.

    Raises:
        ValueError: if there are no values.
    """
    if not len(values):
        raise ValueError("a mean needs at least one value")
    mean = float(np.mean(values))
    if min(values) == max(values):
        return Interval(mean, None, None)
    half = t_quantile(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference_interval(values: Sequence[float], others: Sequence[float]) -> Interval:
    """Mean of the values minus mean of the others, of two independent sets whose variances may differ.

    Welch's degrees of freedom ("The generalization of Student's problem", Biometrika 34, 1947), rounded down. Where
    neither side varies, nothing is said of a spread, and there is no interval.

    Raises:
        ValueError: if there are no values, or no others.
    """
    if not len(values) or not len(others):
        raise ValueError("a difference of means needs at least one value on either side")
    mean = float(np.mean(values)) - float(np.mean(others))
    if len(values) == 1 or len(others) == 1:
        return Interval(mean, None, None)
    first, second = (float(np.var(side, ddof=1)) / len(side) for side in (values, others))
    if first + second == 0:
        return Interval(mean, None, None)
    degrees = (first + second) ** 2 / (first**2 / (len(values) - 1) + second**2 / (len(others) - 1))
    half = t_quantile(max(math.floor(degrees), 1)) * math.sqrt(first + second)
    return Interval(mean, mean - half, mean + half)


@lru_cache(maxsize=256)
def t_quantile(degrees: int) -> float:
    """Half-width, in standard errors, of the interval with so many degrees of freedom: 12.7 for 1, 1.96 for many.

    Raises:
        ValueError: for less than one.
    """
    if degrees < 1:
        raise ValueError(f"Student's t needs at least one degree of freedom; got {degrees}")
    degrees = min(degrees, MOST_DEGREES)
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _share_within(middle, degrees) < LEVEL else (low, middle)
    return (low + high) / 2


def _share_within(t: float, degrees: int) -> float:
    """Probability that |T| is below t: the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    if degrees == 1:
        return 2 * angle / math.pi
    is_odd = degrees % 2
    term = cosine if is_odd else 1.0
    total = term
    for power in range(3 if is_odd else 2, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total
