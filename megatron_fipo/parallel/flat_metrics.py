"""Metrics as flat bytes: what they hold, apart from what they are, which is alike on most ranks and need not travel.

    flat = flatten(on_cpu(metrics))
    Reader(flat.kinds, flat.settings).metrics(flat.content)     # the same metrics

Nothing is rounded or changes its type: a float has its 64 bits, an int stays an int, a tensor keeps its dtype.
"""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.metrics.reductions import KINDS, Correlation, Mean, Metrics, Reduction, Std, Sum, merge

_SETTINGS = {"edges", "quantiles", "exponentiate"}
"""Fields that are alike in all parts of a metric, so that they belong to what the metric is."""
_TYPES = {bool: "?", int: "q", float: "d"}
"""The letters of `struct` for types of numbers; a bool is an int as well, so it comes first."""
_ADDED_BY_FIELD = {Sum, Mean, Std, Correlation}
_ALIGNMENT = 8
"""Tensors begin at multiples of it, so that bytes can be viewed as any dtype."""


@dataclass(frozen=True)
class FlatMetrics:
    """Metrics in three parts.

    Attributes:
        kinds: names, kinds, dtypes and shapes; equal for equal ones.
        settings: tensors among the settings of a metric, such as a histogram's edges, each once.
        content: uint8 [bytes], on the CPU: tensors, then numbers, then a letter for each number's type. How long a
            tensor is along its first dimension is one of the numbers, because a distribution's length differs by rank.
    """

    kinds: bytes
    settings: bytes
    content: Tensor


def on_cpu(metrics: Metrics) -> Metrics:
    """The metrics with every tensor on the CPU, 0-d ones as numbers. Waits for a device once for each dtype."""
    tensors = {
        id(value): value for metric in metrics.values() for value in vars(metric).values() if isinstance(value, Tensor)
    }
    kinds = {(tensor.device, tensor.dtype) for tensor in tensors.values()}
    found: dict[int, Any] = {}
    for kind in kinds:
        alike = {key: tensor for key, tensor in tensors.items() if (tensor.device, tensor.dtype) == kind}
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in alike.values()]).cpu()
        parts = flat.split([tensor.numel() for tensor in alike.values()])
        for (key, tensor), part in zip(alike.items(), parts, strict=True):
            # A clone, because a view keeps the memory of all others, and takes it along where it is pickled.
            found[key] = part.clone().view(tensor.shape) if tensor.dim() else part.item()
    return {
        name: replace(
            metric, **{field: found[id(value)] for field, value in vars(metric).items() if isinstance(value, Tensor)}
        )
        for name, metric in metrics.items()
    }


def flatten(metrics: Mapping[str, Reduction]) -> FlatMetrics:
    """Metrics of `on_cpu` as bytes.

    Raises:
        ValueError: naming a metric whose kind or number has no place in them.
    """
    return _Writer().write(metrics)


class _Writer:
    """Collects what metrics hold, in order."""

    def __init__(self) -> None:
        self._types: list[str] = []
        self._numbers: list[float] = []
        self._tensors: list[bytes] = []
        self._settings = bytearray()
        self._places: dict[int | bytes, int] = {}
        """Where a tensor lies in the settings, by identity and by bytes: histograms have the same edges."""

    def write(self, metrics: Mapping[str, Reduction]) -> FlatMetrics:
        kinds = [self._metric(name, metric) for name, metric in metrics.items()]
        types = "".join(self._types)
        content = b"".join([*self._tensors, struct.pack(f"<{types}", *self._numbers), types.encode()])
        return FlatMetrics(json.dumps(kinds).encode(), bytes(self._settings), as_tensor(content))

    def _metric(self, name: str, metric: Reduction) -> list[Any]:
        kind = type(metric)
        if KINDS.get(kind.__name__) is not kind:
            raise ValueError(
                f"metric {name} is a {kind.__name__}, which cannot be merged over ranks. Use one of {', '.join(KINDS)}."
            )
        held = [self._field(f"{field.name} of metric {name}", field.name, metric) for field in fields(metric)]
        return [name, kind.__name__, held]

    def _field(self, place: str, field: str, metric: Reduction) -> list[Any] | None:
        """What the field is; None for a number."""
        value = getattr(metric, field)
        if isinstance(value, Tensor):
            if field in _SETTINGS:
                return ["set tensor", _dtype_name(value), list(value.shape), self._setting(value)]
            self._number(place, len(value))
            self._tensors.append(_aligned(value))
            return ["tensor", _dtype_name(value), list(value.shape[1:])]
        if field in _SETTINGS:
            return ["set", value]
        self._number(place, value)
        return None

    def _number(self, place: str, value: Any) -> None:
        letter = next((letter for kind, letter in _TYPES.items() if isinstance(value, kind)), None)
        if letter is None:
            raise ValueError(f"{place} is {value!r}, a {type(value).__name__}. Give a float, an int or a tensor.")
        if letter == "q" and not -(2**63) <= value < 2**63:
            raise ValueError(f"{place} is {value}, which does not fit into 64 bits. Give it as a float.")
        self._types.append(letter)
        self._numbers.append(value)

    def _setting(self, tensor: Tensor) -> int:
        """Where the tensor begins in the settings."""
        place = self._places.get(id(tensor))
        if place is None:
            content = _aligned(tensor)
            place = self._places.setdefault(content, len(self._settings))
            if place == len(self._settings):
                self._settings += content
            self._places[id(tensor)] = place
        return place


def as_tensor(content: bytes) -> Tensor:
    """uint8 [bytes], in a memory of its own."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


def as_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor on the CPU."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@dataclass(frozen=True)
class _Place:
    """Where a metric's fields are: each in a list of `_Part`, under an index."""

    kind: type[Reduction]
    fields: list[tuple[str, int]]


class Reader:
    """Reads contents of the same kinds and settings."""

    def __init__(self, kinds: bytes, settings: bytes) -> None:
        self._settings = settings
        self.values_set: list[Any] = []
        self._tensors: list[tuple[int, torch.dtype, tuple[int, ...]]] = []
        """Of each tensor: which number is its length, its dtype, and its shape but for the length."""
        self._num_numbers = 0
        self.places = {
            name: _Place(KINDS[kind], [self._field(*held) if held else self._number() for held in all_held])
            for name, kind, all_held in json.loads(kinds)
        }

    def _number(self) -> tuple[str, int]:
        self._num_numbers += 1
        return "numbers", self._num_numbers - 1

    def _field(self, what: str, *rest: Any) -> tuple[str, int]:
        if what == "tensor":
            dtype, shape = rest
            self._tensors.append((self._number()[1], getattr(torch, dtype), tuple(shape)))
            return "tensors", len(self._tensors) - 1
        if what == "set tensor":
            dtype, shape, start = rest
            value: Any = _set_tensor(self._settings, dtype, tuple(shape), start)
        else:
            value = tuple(tuple(part) for part in rest[0]) if isinstance(rest[0], list) else rest[0]  # JSON's tuples
        self.values_set.append(value)
        return "values_set", len(self.values_set) - 1

    def read(self, content: Tensor) -> Part:
        """Metrics of which nothing is copied: tensors are views of the content."""
        raw = content.numpy()
        types = raw[len(raw) - self._num_numbers :].tobytes().decode()
        numbers = struct.unpack_from(f"<{types}", raw.data, len(raw) - len(types) - struct.calcsize(f"<{types}"))
        place, tensors = 0, []
        for length, dtype, shape in self._tensors:
            tensor, place = _read(content, place, dtype, (numbers[length], *shape))
            tensors.append(tensor)
        return Part(self.places, numbers, tensors, self.values_set)


@dataclass(frozen=True)
class Part:
    """One rank's metrics, as they were read."""

    places: dict[str, _Place]
    numbers: tuple[Any, ...]
    tensors: list[Tensor]
    values_set: list[Any]

    def value(self, name: str, field: int) -> Any:
        """What the field of this index holds."""
        where, index = self.places[name].fields[field]
        return getattr(self, where)[index]

    def metric(self, name: str) -> Reduction:
        """The metric of this name."""
        place = self.places[name]
        return place.kind(*[getattr(self, where)[index] for where, index in place.fields])

    def metrics(self) -> Metrics:
        """All of them, each tensor with memory of its own."""
        own = replace(self, tensors=[tensor.clone() for tensor in self.tensors])
        return {name: own.metric(name) for name in self.places}


def add_up(parts: Sequence[Part]) -> Metrics:
    """`merge` of the metrics of all parts, bit for bit, without an object for each number of each part.

    Raises:
        TypeError, ValueError: as `merge` does.
    """
    names = dict.fromkeys(name for part in parts for name in part.places)
    return {name: _sum_of(name, [part for part in parts if name in part.places]) for name in names}


def _sum_of(name: str, parts: list[Part]) -> Reduction:
    first, *others = {part.places[name].kind: None for part in parts}
    if others:
        return merge([{name: part.metric(name)} for part in parts])[name]
    if first in _ADDED_BY_FIELD:
        num_fields = len(parts[0].places[name].fields)
        return first(
            *(reduce(operator.add, (part.value(name, field) for part in parts)) for field in range(num_fields))
        )
    return reduce(operator.add, (part.metric(name) for part in parts))


@lru_cache(maxsize=8)
def _set_tensor(settings: bytes, dtype: str, shape: tuple[int, ...], start: int) -> Tensor:
    """One object for all metrics with these settings: histograms of the same edges need no comparing to be added."""
    return _read(as_tensor(settings), start, getattr(torch, dtype), shape)[0]


def _read(content: Tensor, start: int, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """(the tensor that begins there, where the next one does)."""
    size = dtype.itemsize * math.prod(shape)
    return content[start : start + size].view(dtype).view(shape), start + size + -size % _ALIGNMENT


def _aligned(tensor: Tensor) -> bytes:
    content = as_bytes(tensor)
    return content + bytes(-len(content) % _ALIGNMENT)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
