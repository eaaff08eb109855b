"""Metrics of every kind with numbers that are hard to add up, and a comparison that sees every bit."""

from __future__ import annotations

import math
import struct
from dataclasses import fields
from random import Random
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.metrics.reductions import (
    Correlation,
    Distribution,
    Histogram,
    Last,
    Max,
    Mean,
    Metrics,
    Min,
    Reduction,
    Std,
    Sum,
)

_EDGES = [torch.linspace(-1, 1, 6, dtype=torch.float64), torch.arange(4.0, dtype=torch.float64)]
_SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 0, True, 2**53 + 1, -(2**60), 3]
_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.int64]
_KINDS = (Sum, Mean, Std, Correlation, Max, Min, Last, Histogram, Distribution, "of one element")


def number(random: Random) -> float | Tensor:
    """A float of any size, a special one, an int beyond float64, or a 0-d tensor."""
    choice = random.randrange(4)
    if choice == 0:
        return random.choice(_SPECIAL)
    value = random.uniform(-1, 1) * 10 ** random.uniform(-9, 9)
    return value if choice == 1 else torch.tensor(value).to(random.choice(_DTYPES))


def metric(name: str, random: Random) -> Reduction:
    """A part of the metric of this name, whose kind and settings are in the name's number."""
    index = int(name.partition("/")[2])
    again, place = divmod(index, len(_KINDS))
    kind = _KINDS[place]
    if kind is Histogram:
        edges = _EDGES[again % 2]
        counts = torch.tensor([random.uniform(0, 10 ** random.uniform(0, 9)) for _ in edges[1:]], dtype=torch.float64)
        return Histogram(counts, edges.clone(), (("p1", 0.01), ("median", 0.5)), exponentiate=again % 2 == 0)
    if kind is Distribution:
        return Distribution(torch.tensor([random.gauss(0, 1) for _ in range(random.randrange(4))], dtype=torch.float32))
    if kind is Last:
        return Last(Random(name).choice([0.1, math.nan, 7, torch.tensor(0.3)]))  # the same of every rank
    if kind == "of one element":
        return Sum(torch.tensor([random.uniform(-1e9, 1e9)], dtype=torch.float32))
    return kind(*(number(random) for _ in fields(kind)))


def metrics(random: Random, num_names: int = 20, share_missing: float = 0.0, shuffled: bool = False) -> Metrics:
    """Two metrics of each kind, unless fewer are asked for; some names may be missing, or in another order."""
    names = [f"metric/{index}" for index in range(num_names) if random.random() >= share_missing]
    if shuffled:
        random.shuffle(names)
    return {name: metric(name, random) for name in names}


def bits(given: Metrics) -> list[Any]:
    """Everything about metrics that can be told apart, their order included, in a form that `==` compares by bits."""
    return [
        (name, type(metric).__name__, [_bits(getattr(metric, field.name)) for field in fields(metric)])
        for name, metric in given.items()
    ]


def _bits(value: Any) -> Any:
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist()
    if isinstance(value, float) and math.isnan(value):
        return "nan"  # of two NaNs with different signs, the interpreter keeps one or the other
    if isinstance(value, float):
        return struct.pack("d", value)
    return type(value).__name__, value
