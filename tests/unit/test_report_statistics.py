"""Intervals against tables and numbers that were computed by hand."""

from __future__ import annotations

import math

import pytest

from megatron_fipo.report.metrics_file import MetricTable
from megatron_fipo.report.statistics import Interval, difference_interval, mean_interval, t_quantile
from megatron_fipo.report.trends import recent, trend


@pytest.mark.parametrize(
    ("degrees", "quantile"),  # two-sided 95 %, from a printed table
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (29, 2.045), (30, 2.042), (120, 1.980)],
)
def test_students_quantile_is_that_of_the_table(degrees: int, quantile: float) -> None:
    assert t_quantile(degrees) == pytest.approx(quantile, abs=6e-4)


def test_many_degrees_of_freedom_come_to_the_normal_distribution() -> None:
    assert t_quantile(10**6) == pytest.approx(1.960, abs=3e-3)
    with pytest.raises(ValueError, match="at least one degree"):
        t_quantile(0)


def test_an_interval_of_three_values() -> None:
    """Mean 2, standard deviation 1: 2 ± 4.303 / sqrt(3)."""
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert low == pytest.approx(2 - 4.3027 / math.sqrt(3), abs=1e-4)
    assert high == pytest.approx(2 + 4.3027 / math.sqrt(3), abs=1e-4)


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5, 0.5]])
def test_values_without_a_spread_have_no_interval(values: list[float]) -> None:
    assert mean_interval(values) == Interval(0.5, None, None)
    assert not mean_interval(values).is_above


def test_an_interval_that_ends_at_0_holds_it() -> None:
    assert not Interval(1.0, 0.0, 2.0).is_above
    assert not Interval(-1.0, -2.0, 0.0).is_below
    assert Interval(1.0, 0.1, 1.9).is_above
    assert Interval(-1.0, -1.9, -0.1).is_below


def test_of_nothing_there_is_no_mean() -> None:
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])
    with pytest.raises(ValueError, match="either side"):
        difference_interval([1.0], [])


def test_a_difference_of_means_after_welch() -> None:
    """Variances 1 and 4 over 3 values each: standard error sqrt(5/3); (5/3)² / ((1/3)² / 2 + (4/3)² / 2) = 2.94 degrees
    of freedom, rounded down to 2."""
    mean, low, high = difference_interval([1.0, 2.0, 3.0], [4.0, 6.0, 8.0])
    assert mean == -4
    half = 4.3027 * math.sqrt(5 / 3)
    assert low == pytest.approx(-4 - half, abs=1e-3)
    assert high == pytest.approx(-4 + half, abs=1e-3)
    assert difference_interval([1.0], [2.0, 3.0]) == Interval(-1.5, None, None)
    assert difference_interval([1.0], [2.0]) == Interval(-1.0, None, None)


def test_a_difference_of_values_without_a_spread_has_no_interval() -> None:
    """Two seeds that happened to come to the same share of 128 problems are no proof that every seed does."""
    assert difference_interval([1.0, 1.0], [0.0, 0.0]) == Interval(1.0, None, None)
    mean, low, high = difference_interval([1.0, 1.0], [0.0, 0.5])  # 0.75 ± 12.706 · 0.25
    assert mean == 0.75
    assert low == pytest.approx(0.75 - 12.706 * 0.25, abs=1e-3)
    assert high == pytest.approx(0.75 + 12.706 * 0.25, abs=1e-3)


def table(values: list[float | None]) -> MetricTable:
    steps = tuple(range(len(values)))
    return MetricTable(steps, {"x": values}, steps, (), False)


def test_a_trend_compares_the_first_third_with_the_last() -> None:
    found = trend(table([0.0, 0.1, None, 5.0, -5.0, 1.0, 1.1]), "x")
    assert found is not None
    assert (found.first, found.last, found.num_steps) == (0.05, 1.05, 2)
    assert found.rises
    assert not found.falls


@pytest.mark.parametrize(
    ("first", "last", "rises", "falls"), [(0, 1, True, False), (1, 0, False, True), (1, 1, False, False)]
)
def test_thirds_that_do_not_vary(first: float, last: float, rises: bool, falls: bool) -> None:
    found = trend(table([*[first] * 3, 0.3, 0.9, 0.1, *[last] * 3]), "x")
    assert found is not None
    assert (found.rises, found.falls) == (rises, falls)


def test_the_middle_third_has_what_is_between() -> None:
    found = trend(table([0.0, 0.2, 1.0, 2.0, 3.0, 6.0, 0.0, 0.4]), "x")
    assert found is not None
    assert (found.first, found.middle, found.last, found.num_steps) == (0.1, 3.0, 0.2, 2)
    assert found.change.mean == pytest.approx(0.1)
    assert found.early_change.mean == pytest.approx(2.9)
    assert found.late_change.mean == pytest.approx(-2.8)


def test_noise_is_no_trend() -> None:
    found = trend(table([0.0, 1.0, 0.5, 0.2, 0.1, 1.1]), "x")
    assert found is not None
    assert found.change.mean == pytest.approx(0.1)
    assert not found.rises
    assert not found.falls


def test_a_few_steps_have_no_trend_but_an_end() -> None:
    assert trend(table([0.0, 1.0, 2.0, 3.0, 4.0, None]), "x") is None
    assert recent(table([0.0, 1.0, 2.0, 3.0, 4.0, 6.0]), "x") == 5.0
    assert recent(table([7.0, None]), "x") == 7.0
    assert recent(table([None]), "x") is None
    assert recent(table([1.0]), "y") is None
