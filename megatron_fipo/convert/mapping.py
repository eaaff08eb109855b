"""How one Megatron parameter and its Hugging Face tensors lay the same numbers out.

A layout primitive is a pair of inverse functions: `to_shard` takes the whole Hugging Face tensors and gives one
rank's parameter, `to_whole` takes every rank's parameter and gives the Hugging Face tensors back. `shard_size` says
how large a parameter is without having any tensor. A model family is a table of rows that name a primitive; see
`families`.

The tables are read where torch is not installed or would be slow to import, as by `megatron-fipo preflight`: so this
module imports torch only when it puts tensors together.

Shapes are those of Hugging Face weights: [out, in], or [out] for a bias. The ranks are those among which the
parameter is cut, `num_shards` of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_fipo.convert.model_shape import ModelShape

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, ...]
"""A tensor's size in every dimension."""


class Layout(Protocol):
    """A pair of inverse functions between whole tensors and the shards of ranks."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, num_shards: int, shard: int) -> Tensor:
        """Hugging Face tensors -> the parameter of rank `shard`."""
        ...

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        """Parameters of all ranks -> Hugging Face tensors."""
        ...

    def shard_size(self, whole: Sequence[Size], shape: ModelShape, num_shards: int) -> Size:
        """Sizes of the Hugging Face tensors -> size of each rank's parameter."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The whole parameter on every rank."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, num_shards: int, shard: int) -> Tensor:
        return whole[0]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [shards[0]]

    def shard_size(self, whole: Sequence[Size], shape: ModelShape, num_shards: int) -> Size:
        return whole[0]


@dataclass(frozen=True)
class Split:
    """A parameter that is cut along one dimension."""

    dim: int

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, num_shards: int, shard: int) -> Tensor:
        return whole[0].chunk(num_shards, self.dim)[shard]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [_together(shards, self.dim)]

    def shard_size(self, whole: Sequence[Size], shape: ModelShape, num_shards: int) -> Size:
        before, cut, after = whole[0][: self.dim], whole[0][self.dim], whole[0][self.dim + 1 :]
        return (*before, cut // num_shards, *after)


@dataclass(frozen=True)
class Vocabulary:
    """Rows of the vocabulary, padded with zero rows and cut."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, num_shards: int, shard: int) -> Tensor:
        table = whole[0]
        padding = shape.padded_vocab_size(num_shards) - len(table)
        if not padding:  # the largest tensor of a model: no copy of it
            return table.chunk(num_shards)[shard]
        return _cat([table, table.new_zeros(padding, *table.shape[1:])]).chunk(num_shards)[shard]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [_together(shards)[: shape.vocab_size]]

    def shard_size(self, whole: Sequence[Size], shape: ModelShape, num_shards: int) -> Size:
        return (shape.padded_vocab_size(num_shards) // num_shards, *whole[0][1:])


@dataclass(frozen=True)
class GroupedQkv:
    """q, k and v interleaved by key-value group: [queries of the group | k | v], then cut by groups."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, num_shards: int, shard: int) -> Tensor:
        groups = shape.num_query_groups
        by_group = [tensor.reshape(groups, -1, *tensor.shape[1:]) for tensor in whole]
        return _cat(by_group, dim=1).flatten(0, 1).chunk(num_shards)[shard]

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        together = _together(shards)
        queries = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
        by_group = together.reshape(shape.num_query_groups, -1, *together.shape[1:])
        parts = by_group.split([queries, shape.head_dim, shape.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]

    def shard_size(self, whole: Sequence[Size], shape: ModelShape, num_shards: int) -> Size:
        return _rows_together(whole, num_shards)


@dataclass(frozen=True)
class GatedMlp:
    """gate and up projections: each rank holds [its rows of gate; its rows of up]."""

    def to_shard(self, whole: Sequence[Tensor], shape: ModelShape, num_shards: int, shard: int) -> Tensor:
        return _cat([tensor.chunk(num_shards)[shard] for tensor in whole])

    def to_whole(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [_cat([half[part] for half in halves]) for part in range(2)]

    def shard_size(self, whole: Sequence[Size], shape: ModelShape, num_shards: int) -> Size:
        return _rows_together(whole, num_shards)


def _together(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    return shards[0] if len(shards) == 1 else _cat(shards, dim)  # no copy of what is whole already


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(list(tensors), dim)


def _rows_together(whole: Sequence[Size], num_shards: int) -> Size:
    """Size of a rank's rows of several tensors, concatenated."""
    return (sum(size[0] for size in whole) // num_shards, *whole[0][1:])
