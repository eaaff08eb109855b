"""Layout primitives between Hugging Face tensors and the shards of ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_fipo.convert.mapping import GatedMlp, GroupedQkv, Layout, Replicated, Split, Vocabulary
from megatron_fipo.convert.model_shape import ModelShape

SHAPE = ModelShape(
    family="qwen2",
    num_layers=2,
    hidden_size=8,
    ffn_hidden_size=6,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=1,
    vocab_size=5,
    max_position_embeddings=64,
    rope_theta=10000.0,
    norm_epsilon=1e-6,
    tied_embeddings=False,
    qkv_bias=True,
)


def rows(*values: int) -> torch.Tensor:
    """A weight whose rows are constant: row i is values[i] everywhere."""
    return torch.tensor(values)[:, None].expand(-1, 3).clone()


def test_qkv_is_interleaved_by_group_by_hand() -> None:
    """Heads q0 q1 share k0, v0; q2 q3 share k1, v1. Each tensor-parallel rank holds one group."""
    query, key, value = rows(0, 1, 2, 3), rows(10, 11), rows(20, 21)
    whole = GroupedQkv().to_shard([query, key, value], SHAPE, 1, 0)
    assert whole[:, 0].tolist() == [0, 1, 10, 20, 2, 3, 11, 21]
    assert GroupedQkv().to_shard([query, key, value], SHAPE, 2, 1)[:, 0].tolist() == [2, 3, 11, 21]


def test_qkv_with_several_channels_a_head_by_hand() -> None:
    shape = replace(SHAPE, num_attention_heads=2, num_query_groups=1, head_dim=2)
    bias = GroupedQkv().to_shard([torch.arange(4), torch.tensor([10, 11]), torch.tensor([20, 21])], shape, 1, 0)
    assert bias.tolist() == [0, 1, 2, 3, 10, 11, 20, 21]


def test_gate_and_up_lie_together_on_each_rank_by_hand() -> None:
    gate, up = rows(0, 1, 2, 3, 4, 5), rows(10, 11, 12, 13, 14, 15)
    assert GatedMlp().to_shard([gate, up], SHAPE, 2, 0)[:, 0].tolist() == [0, 1, 2, 10, 11, 12]
    assert GatedMlp().to_shard([gate, up], SHAPE, 2, 1)[:, 0].tolist() == [3, 4, 5, 13, 14, 15]


def test_the_vocabulary_is_padded_to_128_rows_a_rank() -> None:
    table = rows(1, 2, 3, 4, 5)
    assert SHAPE.padded_vocab_size(1) == 128
    assert SHAPE.padded_vocab_size(2) == 256
    assert replace(SHAPE, vocab_size=257).padded_vocab_size(2) == 512
    assert replace(SHAPE, vocab_size=152064).padded_vocab_size(4) == 152064
    first, second = (Vocabulary().to_shard([table], SHAPE, 2, rank) for rank in range(2))
    assert first.shape == second.shape == (128, 3)
    assert first[:5].equal(table)
    assert not first[5:].any()
    assert not second.any()


def test_a_split_along_columns_by_hand() -> None:
    assert Split(1).to_shard([torch.tensor([[1, 2], [3, 4]])], SHAPE, 2, 1).tolist() == [[2], [4]]


EVERY_LAYOUT = pytest.mark.parametrize(
    ("layout", "shapes"),
    [
        (Replicated(), [(8,)]),
        (Split(0), [(8, 3)]),
        (Split(1), [(3, 8)]),
        (Vocabulary(), [(5, 8)]),
        (GroupedQkv(), [(4, 8), (2, 8), (2, 8)]),
        (GroupedQkv(), [(4,), (2,), (2,)]),
        (GatedMlp(), [(6, 8), (6, 8)]),
    ],
)


@pytest.mark.parametrize("num_shards", [1, 2])
@EVERY_LAYOUT
def test_the_size_of_a_shard_is_known_without_tensors(layout: Layout, shapes: list[Any], num_shards: int) -> None:
    whole = [torch.zeros(shape) for shape in shapes]
    for shard in range(num_shards):
        assert layout.shard_size(shapes, SHAPE, num_shards) == layout.to_shard(whole, SHAPE, num_shards, shard).shape


@pytest.mark.parametrize("tp_size", [1, 2])
@EVERY_LAYOUT
def test_out_is_the_inverse_of_in(layout: Layout, shapes: list[Any], tp_size: int) -> None:
    whole = [torch.randn(shape) for shape in shapes]
    shards = [layout.to_shard(whole, SHAPE, tp_size, rank) for rank in range(tp_size)]
    back = layout.to_whole(shards, SHAPE)
    assert len(back) == len(whole)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(back, whole, strict=True))


def test_what_is_whole_already_is_not_copied() -> None:
    """A vocabulary is most of a small model: reading it must not take it twice."""
    shape = replace(SHAPE, vocab_size=256)
    table = torch.randn(256, 3)
    assert Vocabulary().to_shard([table], shape, 2, 1).data_ptr() == table[128:].data_ptr()
    assert Vocabulary().to_whole([table], shape)[0].data_ptr() == table.data_ptr()
    assert Split(1).to_whole([table], shape)[0].data_ptr() == table.data_ptr()
