"""How one Megatron parameter and the Hugging Face tensors behind it lay the same numbers out.

A layout primitive is a pair of inverse functions: `to_shard` takes the whole Hugging Face tensors and gives one
tensor-parallel rank's parameter, `to_whole` takes every rank's parameter and gives the Hugging Face tensors back. A
model family is a table of rows (Megatron name, Hugging Face names, primitive); see `families`.

Shapes are those of Hugging Face weights: [out, in], or [out] for a bias.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape


class Layout(Protocol):
    """A pair of inverse functions between whole tensors and tensor-parallel shards."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> Tensor:
        """Hugging Face tensors -> the parameter of tensor-parallel rank `tp_rank`."""
        ...

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        """Parameters of all tensor-parallel ranks -> Hugging Face tensors."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same on every rank."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> Tensor:
        return whole[0]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [shards[0]]


@dataclass(frozen=True)
class Split:
    """Cut along one dimension."""

    dim: int

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> Tensor:
        return whole[0].chunk(tp_size, self.dim)[tp_rank]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [_together(shards, self.dim)]


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, padded with zero rows and cut."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> Tensor:
        table = whole[0]
        padding = shape.padded_vocab_size(tp_size) - len(table)
        if not padding:  # the largest tensor of a model: no copy of it
            return table.chunk(tp_size)[tp_rank]
        return torch.cat([table, table.new_zeros(padding, *table.shape[1:])]).chunk(tp_size)[tp_rank]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [_together(shards, 0)[: shape.vocab_size]]


@dataclass(frozen=True)
class GroupedQkv:
    """q, k and v interleaved by key-value group: [queries of the group | k | v], then cut by groups."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> Tensor:
        groups = shape.num_query_groups
        by_group = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in whole]
        return torch.cat(by_group, dim=1).flatten(0, 1).chunk(tp_size)[tp_rank]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        together = _together(shards, 0)
        queries = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
        by_group = together.reshape(shape.num_query_groups, -1, *together.shape[1:])
        parts = by_group.split([queries, shape.head_dim, shape.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class GatedMlp:
    """gate and up projections: each rank holds [its rows of gate; its rows of up]."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> Tensor:
        return torch.cat([tensor.chunk(tp_size)[tp_rank] for tensor in whole])

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[part] for half in halves]) for part in range(2)]


def _together(shards: Sequence[Tensor], dim: int) -> Tensor:
    return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim)  # no copy of what is whole already


@dataclass(frozen=True)
class Row:
    """One parameter of the Megatron model.

    Attributes:
        megatron: its name, `{layer}` standing for the global layer number from 0.
        hugging_face: the tensors behind it.
        layout: how the two correspond.
        is_stored: whether checkpoints call it so. A norm outside the linear layer behind it is stored under the name
            that Transformer Engine's fused layer gives it, so that either kind of layers loads the other's checkpoint.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    layout: Layout
    is_stored: bool = True
