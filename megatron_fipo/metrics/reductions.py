"""Metrics that carry the way in which they are reduced.

A metric is a value with its reduction as a type. Two of the same kind merge with `+`, so the parts of a metric, from
microbatches and from data- and context-parallel ranks, give the same number as one process that saw everything.
Values may be 0-d tensors on any device; `value()` brings the result to a float.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

Number: TypeAlias = float | int | Tensor

ROUNDING_OF_SUMS = 1e-12
"""Share of a mean square up to which a variance may be rounding alone: float64 sums over thousands of parts."""


@dataclass(frozen=True)
class Sum:
    """The total over all parts."""

    total: Number

    def __add__(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    def value(self) -> float:
        return float(self.total)


@dataclass(frozen=True)
class Mean:
    """total / count, each summed on its own; NaN where nothing was counted."""

    total: Number
    count: Number

    def __add__(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    def value(self) -> float:
        count = float(self.count)
        return float(self.total) / count if count else math.nan


@dataclass(frozen=True)
class Std:
    """Population standard deviation from count, sum and sum of squares (take the sums in float64)."""

    total: Number
    total_squared: Number
    count: Number

    def __add__(self, other: Std) -> Std:
        return Std(self.total + other.total, self.total_squared + other.total_squared, self.count + other.count)

    def value(self) -> float:
        count = float(self.count)
        if not count:
            return math.nan
        mean = float(self.total) / count
        return math.sqrt(max(float(self.total_squared) / count - mean * mean, 0.0))


@dataclass(frozen=True)
class Correlation:
    """Pearson's correlation of pairs (x, y) from their count and sums; NaN where either does not vary, or nothing was.

    Take the sums in float64, and of values less something near their means: what the sums cannot tell from rounding
    counts as not varying.
    """

    total_x: Number
    total_y: Number
    total_xx: Number
    total_yy: Number
    total_xy: Number
    count: Number

    def __add__(self, other: Correlation) -> Correlation:
        return Correlation(
            self.total_x + other.total_x,
            self.total_y + other.total_y,
            self.total_xx + other.total_xx,
            self.total_yy + other.total_yy,
            self.total_xy + other.total_xy,
            self.count + other.count,
        )

    def value(self) -> float:
        count = float(self.count)
        if not count:
            return math.nan
        mean_x, mean_y = float(self.total_x) / count, float(self.total_y) / count
        square_x, square_y = float(self.total_xx) / count, float(self.total_yy) / count
        variance_x, variance_y = square_x - mean_x * mean_x, square_y - mean_y * mean_y
        if not (variance_x > ROUNDING_OF_SUMS * square_x and variance_y > ROUNDING_OF_SUMS * square_y):
            return math.nan
        covariance = float(self.total_xy) / count - mean_x * mean_y
        return min(max(covariance / math.sqrt(variance_x) / math.sqrt(variance_y), -1.0), 1.0)


@dataclass(frozen=True)
class Max:
    """The largest value; -inf where there was none."""

    maximum: Number

    def __add__(self, other: Max) -> Max:
        return Max(_larger(self.maximum, other.maximum))

    def value(self) -> float:
        return float(self.maximum)


@dataclass(frozen=True)
class Min:
    """The smallest value; +inf where there was none."""

    minimum: Number

    def __add__(self, other: Min) -> Min:
        return Min(-_larger(-self.minimum, -other.minimum))

    def value(self) -> float:
        return float(self.minimum)


@dataclass(frozen=True)
class Last:
    """A number that is the same for every contributor (a learning rate, a gradient norm); a difference is a bug."""

    last: Number

    def __add__(self, other: Last) -> Last:
        mine, theirs = float(self.last), float(other.last)
        if mine != theirs and not (math.isnan(mine) and math.isnan(theirs)):
            raise ValueError(f"a metric that should be the same everywhere is {mine} here and {theirs} there")
        return self

    def value(self) -> float:
        return float(self.last)


Quantiles: TypeAlias = tuple[tuple[str, float], ...]
"""(name, share in [0, 1]) of each quantile that is reported, such as ("p75", 0.75)."""


@dataclass(frozen=True)
class Histogram:
    """Counts over fixed bins, from which quantiles are read. Reported as several scalars, see `scalars`.

    Attributes:
        counts: [bins] float64, bin b holding values in [edges[b], edges[b + 1]); the outermost bins take the rest.
        edges: [bins + 1] float64, ascending, the same for every part.
        quantiles: those that `scalars` reports.
        exponentiate: whether the binned values are logarithms, and quantiles are to be reported as exp of them.
    """

    counts: Tensor
    edges: Tensor
    quantiles: Quantiles = (("p25", 0.25), ("median", 0.5), ("p75", 0.75))
    exponentiate: bool = False

    def __add__(self, other: Histogram) -> Histogram:
        if self.edges is not other.edges and not torch.equal(self.edges.cpu(), other.edges.cpu()):
            raise ValueError("histograms with different edges cannot be added")
        return replace(self, counts=self.counts + other.counts.to(self.counts.device))

    def quantile(self, q: float) -> float:
        """Value below which the share q of the counts lies, linear within its bin; NaN where nothing was counted."""
        counts, edges = self.counts.cpu().double(), self.edges.cpu().double()
        cumulative = counts.cumsum(0)
        total = float(cumulative[-1])
        if not total:
            return math.nan
        filled = counts > 0
        first, last = int(filled.nonzero()[0]), int(filled.nonzero()[-1])
        target = q * total
        index = int(torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64)).clamp(first, last))
        before = float(cumulative[index] - counts[index])
        inside = (target - before) / float(counts[index])
        value = float(edges[index] + inside * (edges[index + 1] - edges[index]))
        return math.exp(value) if self.exponentiate else value


@dataclass(frozen=True)
class Distribution:
    """All the values themselves, for exact quantiles where there are thousands of values, not millions.

    Attributes:
        values: [n] float32, in any order.
        quantiles: those that `scalars` reports.
    """

    values: Tensor
    quantiles: Quantiles = (("min", 0.0), ("p25", 0.25), ("median", 0.5), ("p75", 0.75), ("max", 1.0))

    def __add__(self, other: Distribution) -> Distribution:
        return replace(self, values=torch.cat([self.values, other.values.to(self.values.device)]))

    def quantile(self, q: float) -> float:
        """Value at the share q of the sorted values, linear between neighbours; NaN where there are none."""
        ordered = self.values.double().sort().values
        if not len(ordered):
            return math.nan
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def _larger(mine: Number, other: Number) -> Number:
    """`max` of both, on their device if they share one, so that the host need not wait for it."""
    if isinstance(mine, Tensor) and isinstance(other, Tensor) and mine.device == other.device:
        return torch.where(other > mine, other, mine)
    return max(float(mine), float(other))


Reduction: TypeAlias = Sum | Mean | Std | Correlation | Max | Min | Last | Histogram | Distribution
Metrics: TypeAlias = dict[str, Reduction]


def merge(parts: list[Mapping[str, Reduction]]) -> Metrics:
    """Add up metrics of the same name; names may be missing from some parts.

    Raises:
        TypeError: if parts disagree on how a metric is reduced.
    """
    merged: Metrics = {}
    for part in parts:
        for name, metric in part.items():
            if name not in merged:
                merged[name] = metric
                continue
            if type(merged[name]) is not type(metric):
                raise TypeError(
                    f"metric {name} is a {type(merged[name]).__name__} here and a {type(metric).__name__} there"
                )
            merged[name] = merged[name] + metric  # type: ignore[operator]
    return merged


def scalars(metrics: Mapping[str, Reduction]) -> dict[str, float]:
    """One number per name for the sinks; histograms and distributions become name/<quantile>."""
    numbers: dict[str, float] = {}
    for name, metric in metrics.items():
        if isinstance(metric, Histogram | Distribution):
            numbers |= {f"{name}/{label}": metric.quantile(q) for label, q in metric.quantiles}
        else:
            numbers[name] = metric.value()
    return numbers


KINDS = {kind.__name__: kind for kind in (Sum, Mean, Std, Correlation, Max, Min, Last, Histogram, Distribution)}


def to_plain(metrics: Mapping[str, Reduction]) -> dict[str, dict[str, Any]]:
    """The metrics as containers, numbers and CPU tensors only, to be saved. Nothing is rounded."""
    return {
        name: {
            "kind": type(metric).__name__,
            **{
                field.name: value.detach().cpu() if isinstance(value, Tensor) else value
                for field in fields(metric)
                for value in [getattr(metric, field.name)]
            },
        }
        for name, metric in metrics.items()
    }


def from_plain(plain: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """The inverse of `to_plain`."""
    return {
        name: KINDS[values["kind"]](**{key: value for key, value in values.items() if key != "kind"})
        for name, values in plain.items()
    }
