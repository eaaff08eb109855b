"""A Megatron checkpoint, checked against the model that it should hold, and read as Hugging Face tensors."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.convert.dtypes import FLOATS
from megatron_fipo.convert.families import expected_tensors, stored_rows
from megatron_fipo.convert.families.row import Parameter
from megatron_fipo.convert.mapping import Vocabulary
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.convert.problems import Problem, ProblemsError, placed
from megatron_fipo.convert.torch_dist import TorchDistReader

_OPTIMIZER = "optimizer."
"""Prefix of the names of what a training checkpoint stores besides the model."""


class MegatronSource:
    """A Megatron checkpoint's weights as Hugging Face tensors.

    Attributes:
        folder: the checkpoint.
        shape: the model's shape.
        rows: every parameter to read, in the order of a converted checkpoint.
    """

    def __init__(self, folder: str | Path, shape: ModelShape) -> None:
        """
        Raises:
            ValueError: if the folder is no torch_dist checkpoint.
            ProblemsError: listing what is missing, unmapped, cut off, or of another shape or dtype.
        """
        self.folder, self.shape = Path(folder), shape
        self.rows = stored_rows(shape)
        self._reader = TorchDistReader(folder)
        self._is_by_layer = any(key.startswith("decoder.layers.0.") for key in self._reader.keys)
        if problems := self._problems():
            raise ProblemsError(placed(problems, self.folder))

    @property
    def num_bytes(self) -> int:
        """Size of all weights, as Hugging Face tensors in the checkpoint's dtype."""
        return sum(prod(size) * self.dtype.itemsize for size in expected_tensors(self.shape).values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all weights."""
        return self._reader.dtype(self._place(self.rows[0])[0])

    def read(self, row: Parameter) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of each tensor of a row.

        Raises:
            ValueError: if it cannot be read.
        """
        parameter = self._reader.read(*self._place(row))
        yield from zip(row.names, row.layout.to_whole([parameter], self.shape), strict=True)

    def file(self, row: Parameter) -> str:
        """The files that hold a row, after the checkpoint's name."""
        return f"{self.folder.resolve().name}/{self._files(row)}"

    def _files(self, row: Parameter) -> str:
        return ", ".join(file.name for file in self._reader.files(*self._place(row)))

    def _place(self, row: Parameter) -> tuple[str, int | None]:
        """(name, layer): Megatron stores either one tensor for all layers or one for each."""
        if row.layer is not None and self._is_by_layer:
            return row.megatron, None
        return row.key, row.layer

    def _problems(self) -> list[Problem]:
        present, metadata = set(self._reader.keys), ".metadata"
        problems, known, dtypes = [], set(), {}
        for row in self.rows:
            key, layer = self._place(row)
            if key not in present:
                if key not in known:
                    problems.append(Problem("missing", key, metadata, f"the {self.shape.family} table implies it"))
            else:
                problems += self._check_size(row, key, layer)
                dtypes[key] = self._reader.dtype(key)
            known.add(key)
        common = next(iter(dtypes.values()), torch.float32)
        for key, dtype in dtypes.items():
            if dtype not in FLOATS or dtype != common:
                expected = f"{common}, as others are" if common in FLOATS else "float32, float16 or bfloat16"
                problems.append(Problem("dtype", key, metadata, f"it is {dtype}; expected is {expected}"))
        for key in sorted(present - known):
            if not key.startswith(_OPTIMIZER):
                problems.append(
                    Problem("unmapped", key, metadata, f"config.json's {self.shape.family} model has no such parameter")
                )
        for key, file, detail in self._reader.truncated():
            if not key.startswith(_OPTIMIZER):
                problems.append(Problem("truncated", key, file.name, detail))
        return problems

    def _check_size(self, row: Parameter, key: str, layer: int | None) -> list[Problem]:
        expected = row.shard_size(self.shape, tp=1)
        if layer is not None:
            expected = (self.shape.num_layers, *expected)
        found, place = self._reader.shape(key), self._files(row)
        if isinstance(row.layout, Vocabulary) and found[1:] == expected[1:]:
            if found[0] >= self.shape.vocab_size:  # padded for another layout
                return []
            detail = f"it has {found[0]} rows; config.json says vocab_size={self.shape.vocab_size}"
            return [Problem("vocabulary", key, place, detail)]
        if found == expected or row.layer:  # a tensor of all layers is reported once, with layer 0
            return []
        return [Problem("shape", key, place, f"it is {list(found)}; config.json implies {list(expected)}")]
