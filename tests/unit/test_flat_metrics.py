"""Metrics as bytes, and the sum of many ranks' bytes."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from megatron_fipo.metrics.reductions import Distribution, Histogram, Last, Max, Metrics, Std, Sum, merge
from megatron_fipo.parallel.flat_metrics import Part, Reader, add_up, flatten, on_cpu
from tests.random_metrics import bits, metrics

EDGES = torch.arange(4.0, dtype=torch.float64)


def _parts(given: list[Metrics]) -> list[Part]:
    flats = [flatten(one) for one in given]
    return [Reader(flat.kinds, flat.settings).read(flat.content) for flat in flats]


@pytest.mark.parametrize("seed", range(5))
def test_metrics_come_back_with_their_bits(seed: int) -> None:
    given = on_cpu(metrics(Random(seed), share_missing=0.2, shuffled=True))
    assert bits(_parts([given])[0].metrics()) == bits(given)


def test_nothing_is_something_too() -> None:
    assert _parts([{}])[0].metrics() == {}
    empty = {
        "none": Distribution(torch.empty(0)),
        "no/bins": Histogram(torch.empty(0).double(), torch.ones(1).double()),
    }
    assert bits(_parts([empty])[0].metrics()) == bits(empty)  # type: ignore[arg-type]


def test_equal_metrics_have_equal_kinds_whatever_they_hold() -> None:
    one, other = ({"sum": Sum(3), "values": Distribution(torch.rand(n))} for n in (2, 5))
    assert flatten(one).kinds == flatten(other).kinds  # type: ignore[arg-type]
    histograms = [{"a": Histogram(torch.ones(3).double(), edges)} for edges in (EDGES, EDGES.clone(), EDGES + 1)]
    settings = [flatten(histogram).settings for histogram in histograms]  # type: ignore[arg-type]
    assert settings[0] == settings[1] != settings[2]


def test_edges_that_histograms_share_are_kept_once() -> None:
    histogram = Histogram(torch.ones(3).double(), EDGES)
    two = flatten({"a": histogram, "b": Histogram(torch.ones(3).double(), EDGES.clone())})
    assert two.settings == flatten({"a": histogram}).settings


def test_each_tensor_has_a_memory_of_its_own() -> None:
    flat = flatten({"a": Histogram(torch.ones(3).double(), EDGES), "b": Distribution(torch.ones(2))})
    found = Reader(flat.kinds, flat.settings).read(flat.content).metrics()
    flat.content.zero_()
    assert found["a"].counts.tolist() == [1, 1, 1]  # type: ignore[union-attr]
    assert found["b"].values.untyped_storage().nbytes() == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("share_missing", [0.0, 0.3])
def test_a_sum_has_the_bits_of_one_merge_after_the_other(share_missing: float, shuffled: bool) -> None:
    random = Random(7)
    given = [on_cpu(metrics(random, 20, share_missing, shuffled)) for _ in range(40)]
    expected = bits(merge(given))  # type: ignore[arg-type]
    assert bits(add_up(_parts(given))) == expected
    assert bits(add_up(_parts(given[::-1]))) != expected, "the order is not noticed"


@pytest.mark.parametrize(
    "given",
    [
        ({"a": Last(1.0)}, {"a": Last(2.0)}),
        ({"a": Sum(1.0)}, {"a": Max(1.0)}),
        ({"a": Max(1.0)}, {"a": Sum(1.0)}),
        ({"a": Histogram(torch.ones(3), EDGES)}, {"a": Histogram(torch.ones(3), EDGES + 1)}),
    ],
)
def test_what_does_not_add_up_is_refused_as_by_merge(given: tuple[Metrics, Metrics]) -> None:
    with pytest.raises((TypeError, ValueError)) as expected:
        merge(list(given))
    with pytest.raises(expected.type) as found:
        add_up(_parts(list(given)))
    assert str(found.value) == str(expected.value)


class Product(Sum):
    """A kind of somebody's own."""


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Sum(2**63), "total of metric a/b is 9223372036854775808, which does not fit into 64 bits"),
        (Std(1.0, np.float32(2), 1), r"total_squared of metric a/b is .*2\.0.*, a float32. Give a float"),
        (Last("fast"), "last of metric a/b is 'fast', a str"),  # type: ignore[arg-type]
        (Product(1), "metric a/b is a Product, which cannot be merged over ranks. Use one of Sum, Mean"),
    ],
)
def test_what_has_no_place_is_refused_by_name(metric: Sum, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flatten({"a/b": metric})
