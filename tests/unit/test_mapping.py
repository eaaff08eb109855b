"""Layout primitives between Hugging Face tensors and tensor-parallel shards, and the tables made of them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_fipo.convert.families import TABLES, expected_tensors, find_row, stored_rows
from megatron_fipo.convert.hf_config import ModelShape, read_model_shape
from megatron_fipo.convert.mapping import GatedMlp, GroupedQkv, Layout, Replicated, Split, Vocabulary
from tests.models import save_random_model

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


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
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
def test_out_is_the_inverse_of_in(layout: Layout, shapes: list[Any], tp_size: int) -> None:
    whole = [torch.randn(shape) for shape in shapes]
    shards = [layout.to_shard(whole, SHAPE, tp_size, rank) for rank in range(tp_size)]
    back = layout.to_whole(shards, SHAPE)
    assert len(back) == len(whole)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(back, whole, strict=True))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"tie_word_embeddings": True}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 1}),
        ("llama", {}),
        ("llama", {"head_dim": 16, "num_key_value_heads": 4}),
        ("llama", {"attention_bias": True}),
        ("qwen3", {"head_dim": 16}),
        ("qwen3", {"head_dim": 16, "attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_the_expected_tensors_are_those_that_transformers_writes(
    tmp_path: Path, family: str, changes: dict[str, Any]
) -> None:
    folder = save_random_model(tmp_path / "model", family, **changes)
    written = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert expected_tensors(read_model_shape(folder)) == written


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("family", sorted(TABLES))
def test_a_table_reaches_every_tensor_with_either_kind_of_layers(
    family: str, output_bias: bool, qkv_bias: bool
) -> None:
    """Transformer Engine's layers hold their norms inside the linear layers; everything else has one name."""
    shape = replace(SHAPE, family=family, qkv_bias=qkv_bias, output_bias=output_bias, qk_norm=family == "qwen3")
    fused = {"linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight"}
    separate = {"input_layernorm.weight", "pre_mlp_layernorm.weight"}
    for left_out in (fused, separate):
        names = {
            name.format(layer=layer)
            for row in TABLES[family]
            if not any(row.megatron.endswith(f".{end}") for end in left_out)
            for name in row.hugging_face
            for layer in range(shape.num_layers)
        }
        absent = set()
        if not qkv_bias:
            absent |= {name for name in names if name.endswith((".q_proj.bias", ".k_proj.bias", ".v_proj.bias"))}
            assert len(absent) == 3 * shape.num_layers
        if not output_bias:
            absent |= {name for name in names if name.endswith(".o_proj.bias")}
        assert names - absent == set(expected_tensors(shape))


@pytest.mark.parametrize("family", sorted(TABLES))
def test_what_a_checkpoint_stores_is_every_tensor_once_in_transformers_order(family: str) -> None:
    shape = replace(SHAPE, family=family, qk_norm=family == "qwen3", tied_embeddings=family == "llama")
    stored = stored_rows(shape)
    names = [name for entry in stored for name in entry.row.hugging_face]
    assert sorted(names) == sorted(expected_tensors(shape))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == ("model.norm.weight" if family == "llama" else "lm_head.weight")
    assert [entry.layer for entry in stored if entry.layer is not None] == sorted(
        entry.layer for entry in stored if entry.layer is not None
    )
    second = next(entry for entry in stored if entry.layer == 1 and "linear_fc2" in entry.key)
    assert second.key == "decoder.layers.mlp.linear_fc2.weight"
    assert second.row.megatron == "decoder.layers.1.mlp.linear_fc2.weight"
    assert second.row.hugging_face == ("model.layers.1.mlp.down_proj.weight",)


def test_what_is_whole_already_is_not_copied() -> None:
    """A vocabulary is most of a small model: reading it must not take it twice."""
    shape = replace(SHAPE, vocab_size=256)
    table = torch.randn(256, 3)
    assert Vocabulary().to_shard([table], shape, 2, 1).data_ptr() == table[128:].data_ptr()
    assert Vocabulary().to_whole([table], shape)[0].data_ptr() == table.data_ptr()
    assert Split(1).to_whole([table], shape)[0].data_ptr() == table.data_ptr()


def test_transformer_engines_fused_norms_have_rows() -> None:
    """Names as Transformer Engine's layer specification gives them."""
    for name, hugging_face in {
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
    }.items():
        row = find_row("llama", name, 7)
        assert row.hugging_face == (f"model.layers.7.{hugging_face}.weight",)
        assert row.megatron == name.format(layer=7)


def test_no_megatron_name_has_two_rows() -> None:
    for table in TABLES.values():
        names = [row.megatron for row in table]
        assert len(names) == len(set(names))


def test_an_unknown_parameter_is_named() -> None:
    name = "decoder.layers.{layer}.mlp.router.weight"
    with pytest.raises(KeyError, match=re.escape(f"qwen2 table has no row for the Megatron parameter {name}")):
        find_row("qwen2", name, 0)
