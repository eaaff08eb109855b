"""Every reduction: the parts merged are the whole, and a plain average of the parts is not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_fipo.metrics.reductions import (
    Correlation,
    Distribution,
    Histogram,
    Last,
    Max,
    Mean,
    Min,
    Reduction,
    Std,
    Sum,
    merge,
    scalars,
)

EDGES = torch.linspace(-4, 4, 81, dtype=torch.float64)


def histogram(values: Tensor) -> Histogram:
    bins = torch.bucketize(values.double(), EDGES, right=True).sub(1).clamp(0, len(EDGES) - 2)
    return Histogram(torch.bincount(bins, minlength=len(EDGES) - 1).double(), EDGES)


def correlation(x: Tensor, y: Tensor) -> Correlation:
    return Correlation(x.sum(), y.sum(), x.square().sum(), y.square().sum(), (x * y).sum(), len(x))


MAKERS: dict[str, Callable[[Tensor], Reduction]] = {
    "sum": lambda values: Sum(values.sum()),
    "mean": lambda values: Mean(values.sum(), len(values)),
    "std": lambda values: Std(values.sum(), values.square().sum(), len(values)),
    "correlation": lambda values: correlation(values, values.exp()),
    "max": lambda values: Max(values.amax()),
    "min": lambda values: Min(values.amin()),
    "histogram": histogram,
    "distribution": Distribution,
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_parts_merge_to_the_whole(make: Callable[[Tensor], Reduction]) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    parts = [make(part) for part in values.split([1, 99, 700, 200])]
    merged = scalars(merge([{"x": part} for part in parts]))
    assert merged == pytest.approx(scalars({"x": make(values)}), rel=1e-12)
    averaged = {name: sum(scalars({"x": part})[name] for part in parts) / len(parts) for name in merged}
    assert averaged != pytest.approx(merged, rel=1e-3)


def test_values_by_hand() -> None:
    assert Sum(3).value() == 3
    assert (Mean(6, 2) + Mean(0, 4)).value() == 1
    assert (Std(1, 1, 1) + Std(3, 9, 1)).value() == 1
    # (1, 3), (2, 1) and (4, 5): deviations (-4, 0), (-1, -6), (5, 6) in thirds; covariance 36, variances 42 and 72.
    assert (Correlation(3, 4, 5, 10, 5, 2) + Correlation(4, 5, 16, 25, 20, 1)).value() == pytest.approx(36 / 3024**0.5)
    assert (Max(1) + Max(torch.tensor(5.0))).value() == 5
    assert (Min(1) + Min(-2)).value() == -2


def test_nothing_counted() -> None:
    assert math.isnan(Mean(0, 0).value())
    assert math.isnan(Std(0, 0, 0).value())
    assert math.isnan(Correlation(0, 0, 0, 0, 0, 0).value())
    assert math.isnan(histogram(torch.zeros(0)).quantile(0.5))
    assert math.isnan(Distribution(torch.zeros(0)).quantile(0.5))
    assert (Max(-math.inf) + Max(2)).value() == 2


def test_a_correlation_needs_both_to_vary() -> None:
    values = torch.linspace(-1, 1, 1001, dtype=torch.float64)
    for constant in (torch.full_like(values, hundredths / 100) for hundredths in range(20)):  # whose sums are rounded
        for x, y in ((values, constant), (constant, values), (constant, constant)):
            parts = [correlation(a, b) for a, b in zip(x.split(77), y.split(77), strict=True)]
            assert math.isnan(merge([{"x": part} for part in parts])["x"].value())
    almost = 0.1 + 1e-5 * values
    assert correlation(values, almost).value() == pytest.approx(1.0, rel=1e-6)
    assert correlation(values, -values).value() == -1.0
    assert math.isnan(correlation(values, values * math.inf).value())


def test_last_must_be_alike() -> None:
    assert (Last(2) + Last(torch.tensor(2))).value() == 2
    assert math.isnan((Last(math.nan) + Last(math.nan)).value())
    with pytest.raises(ValueError, match=r"2\.0 here and 3\.0 there"):
        Last(2) + Last(3)


def test_histogram_quantiles() -> None:
    # Four values in [0, 1), none in [1, 2), one in [2, 3).
    counted = Histogram(torch.tensor([4.0, 0.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]))
    assert counted.quantile(0.4) == 0.5
    assert counted.quantile(0.8) == 1.0
    assert counted.quantile(0.9) == 2.5
    assert counted.quantile(1.0) == 3.0
    assert counted.quantile(0.0) == 0.0
    first_empty = Histogram(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    assert first_empty.quantile(0.0) == 1.0


def test_histogram_quantiles_are_within_a_bin_of_the_values() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for q in (0.01, 0.25, 0.5, 0.75, 0.99):
        assert histogram(values).quantile(q) == pytest.approx(float(values.quantile(q)), abs=0.1)


def test_histogram_of_logarithms() -> None:
    counted = Histogram(torch.tensor([1.0]), torch.tensor([0.0, 2.0]), quantiles=(("p50", 0.5),), exponentiate=True)
    assert scalars({"ratio": counted + counted}) == {"ratio/p50": math.e}


def test_histograms_with_other_edges_do_not_add() -> None:
    with pytest.raises(ValueError, match="different edges"):
        histogram(torch.zeros(1)) + Histogram(torch.zeros(1), torch.tensor([0.0, 1.0]))


def test_distribution_is_exact() -> None:
    values = torch.randn(37, generator=torch.Generator().manual_seed(2))
    for q in (0.0, 0.1, 0.25, 0.5, 0.999, 1.0):
        assert Distribution(values).quantile(q) == pytest.approx(float(values.double().quantile(q)), rel=1e-12)


def test_merge_keeps_names_that_some_parts_lack() -> None:
    assert scalars(merge([{"a": Sum(1)}, {"b": Sum(2)}, {"a": Sum(4)}])) == {"a": 5, "b": 2}


def test_merge_refuses_different_reductions() -> None:
    with pytest.raises(TypeError, match="metric a is a Sum here and a Mean there"):
        merge([{"a": Sum(1)}, {"a": Mean(1, 1)}])


@pytest.mark.parametrize("mine", [1.5, -2.0, 0.0, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("other", [1.5, -2.0, -0.0, math.inf, -math.inf, math.nan])
def test_extremes_of_tensors_are_those_of_numbers(mine: float, other: float) -> None:
    """They stay on their device; a NaN counts, as in Python, where it comes first."""
    for kind, of_numbers in ((Max, max), (Min, min)):
        merged = kind(torch.tensor(mine)) + kind(torch.tensor(other))
        assert isinstance(next(iter(vars(merged).values())), torch.Tensor)
        assert merged.value() == pytest.approx(of_numbers(mine, other), abs=0, nan_ok=True)
        assert (kind(torch.tensor(mine)) + kind(other)).value() == pytest.approx(
            of_numbers(mine, other), abs=0, nan_ok=True
        )


def test_histograms_of_other_edges_are_refused_and_equal_edges_need_not_be_one_tensor() -> None:
    counts, edges = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    assert (Histogram(counts, edges) + Histogram(counts, edges.clone())).counts.tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="different edges"):
        Histogram(counts, edges) + Histogram(counts, edges + 1)
