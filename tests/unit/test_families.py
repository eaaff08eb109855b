"""The tables of the families, and what is derived from them: names, sizes, ranks, checkpoints."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_fipo.config import ParallelSection
from megatron_fipo.convert.families import FAMILIES, expected_tensors, find_row, rows, stored_rows
from megatron_fipo.convert.families.decoder import ATTENTION_INPUT, ATTENTION_OUTPUT, OUTSIDE_LAYERS
from megatron_fipo.convert.families.family import Family
from megatron_fipo.convert.families.row import HfTensor, Row
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.mapping import GatedMlp, Replicated, Split
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.preflight.parameters import stage_parameters, whole_parameters
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
    shape = read_model_shape(folder)
    assert expected_tensors(shape) == written
    assert whole_parameters(shape) == sum(prod(size) for size in written.values())


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("output_bias", [False, True])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_table_reaches_every_tensor_with_either_kind_of_layers(
    family: str, output_bias: bool, qkv_bias: bool
) -> None:
    """Transformer Engine's layers hold their norms inside the linear layers; everything else has one name."""
    shape = replace(SHAPE, family=family, qkv_bias=qkv_bias, output_bias=output_bias, qk_norm=family == "qwen3")
    fused = ("linear_qkv.layer_norm_weight", "linear_fc1.layer_norm_weight")
    separate = (".input_layernorm.weight", ".pre_mlp_layernorm.weight")
    for left_out in (fused, separate):
        held = [row for row in rows(shape) if not row.megatron.endswith(left_out)]
        assert len(held) == len(rows(shape)) - 2 * shape.num_layers
        names = [name for row in held for name in row.names]
        assert sorted(names) == sorted(expected_tensors(shape))
    assert ("model.layers.1.self_attn.k_proj.bias" in expected_tensors(shape)) == qkv_bias
    assert ("model.layers.1.self_attn.o_proj.bias" in expected_tensors(shape)) == output_bias


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_checkpoint_stores_is_every_tensor_once_from_input_to_output(family: str) -> None:
    shape = replace(SHAPE, family=family, qk_norm=family == "qwen3", tied_embeddings=family == "llama")
    stored = stored_rows(shape)
    names = [name for row in stored for name in row.names]
    assert sorted(names) == sorted(expected_tensors(shape))
    assert names[0] == "model.embed_tokens.weight"
    assert names[-1] == ("model.norm.weight" if family == "llama" else "lm_head.weight")
    layers = [row.layer for row in stored if row.layer is not None]
    assert layers == sorted(layers)
    second = next(row for row in stored if row.layer == 1 and "linear_fc2" in row.key)
    assert second.key == "decoder.layers.mlp.linear_fc2.weight"
    assert second.megatron == "decoder.layers.1.mlp.linear_fc2.weight"
    assert second.names == ("model.layers.1.mlp.down_proj.weight",)


def test_random_models_are_drawn_in_the_order_in_which_they_always_were() -> None:
    """certify's numbers are those of random weights, which are drawn one tensor after the other."""
    qwen3 = replace(SHAPE, family="qwen3", qk_norm=True)
    for shape, attention in (
        (SHAPE, "q_proj.weight q_proj.bias k_proj.weight k_proj.bias v_proj.weight v_proj.bias o_proj.weight"),
        (replace(qwen3, qkv_bias=False), "q_proj.weight k_proj.weight v_proj.weight q_norm.weight k_norm.weight "
            "o_proj.weight"),
    ):  # fmt: skip
        expected = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
        for layer in ("model.layers.0", "model.layers.1"):
            expected += [f"{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
            expected += [f"{layer}.self_attn.{name}" for name in attention.split()]
            expected += [f"{layer}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
        assert list(expected_tensors(shape)) == expected


def test_transformer_engines_fused_norms_have_rows() -> None:
    """Names as Transformer Engine's layer specification gives them."""
    shape = replace(SHAPE, family="llama", num_layers=8)
    for name, hugging_face in {
        "decoder.layers.7.self_attention.linear_qkv.layer_norm_weight": "input_layernorm",
        "decoder.layers.7.mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm",
    }.items():
        assert find_row(shape, name).names == (f"model.layers.7.{hugging_face}.weight",)


def test_no_megatron_name_has_two_rows() -> None:
    for family in FAMILIES.values():
        names = [row.megatron for row in family.table]
        assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("decoder.layers.0.mlp.router.weight", {}),
        ("decoder.layers.2.mlp.linear_fc2.weight", {}),
        ("decoder.layers.0.self_attention.linear_qkv.bias", {"qkv_bias": False}),
        ("output_layer.weight", {"tied_embeddings": True}),
    ],
)
def test_a_parameter_that_the_model_does_not_have_is_named(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match=re.escape(f"qwen2 table has no row for the Megatron parameter {name}")):
        find_row(replace(SHAPE, **changes), name)


def test_a_row_whose_axis_contradicts_its_layout_is_noticed_when_it_is_written() -> None:
    tensors = (HfTensor("a.weight", lambda shape: (shape.hidden_size,)),)
    with pytest.raises(AssertionError, match="contradict"):
        Row("a.weight", tensors, Replicated(), axis="tp")
    with pytest.raises(AssertionError, match="contradict"):
        Row("a.weight", tensors, Split(0), axis=None)
    with pytest.raises(AssertionError, match="only they are spread over axis ep"):
        Row("a.weight", tensors, Split(0), axis="ep")


# --- experts ---------------------------------------------------------------------------------------------------------

_MLP, _HF_MLP = "decoder.layers.{layer}.mlp.", "model.layers.{layer}.mlp."
_EXPERT, _HF_EXPERT = f"{_MLP}experts.local_experts.{{expert}}.", f"{_HF_MLP}experts.{{expert}}."
MIXTURE = Family(
    name="small_mixture",
    architecture="SmallMixtureForCausalLM",
    table=(
        *OUTSIDE_LAYERS,
        *ATTENTION_INPUT,
        *ATTENTION_OUTPUT,
        Row(
            f"{_MLP}router.weight",
            (HfTensor(f"{_HF_MLP}gate.weight", lambda shape: (shape.num_experts, shape.hidden_size)),),
            Replicated(),
            axis=None,
        ),
        Row(
            f"{_EXPERT}linear_fc1.weight",
            tuple(
                HfTensor(f"{_HF_EXPERT}{part}_proj.weight", lambda shape: (shape.ffn_hidden_size, shape.hidden_size))
                for part in ("gate", "up")
            ),
            GatedMlp(),
            axis="ep",
        ),
        Row(
            f"{_EXPERT}linear_fc2.weight",
            (HfTensor(f"{_HF_EXPERT}down_proj.weight", lambda shape: (shape.hidden_size, shape.ffn_hidden_size)),),
            Split(1),
            axis="ep",
        ),
    ),
)
"""A mixture of experts as a table, with Megatron's names of SequentialMLP. No model of it can be trained yet."""


@pytest.fixture
def mixture(monkeypatch: pytest.MonkeyPatch) -> ModelShape:
    """Registered as a new family would be: nothing else is told of it."""
    monkeypatch.setitem(FAMILIES, MIXTURE.name, MIXTURE)
    return replace(SHAPE, family=MIXTURE.name, num_experts=4)


def test_every_expert_has_tensors_of_its_own(mixture: ModelShape) -> None:
    tensors = expected_tensors(mixture)
    experts = {name: size for name, size in tensors.items() if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    assert experts["model.layers.1.mlp.experts.3.down_proj.weight"] == (8, 6)
    assert experts["model.layers.0.mlp.experts.2.up_proj.weight"] == (6, 8)
    assert tensors["model.layers.1.mlp.gate.weight"] == (4, 8)
    attention = 2 * (8 + 2 * (4 * 8) + 2 * (2 * 8) + 4 + 2 * 2)
    assert whole_parameters(mixture) == 2 * 5 * 8 + 8 + attention + 2 * 4 * 8 + 2 * 4 * 3 * 6 * 8


def test_a_rank_of_two_holds_half_of_the_experts_and_all_else(mixture: ModelShape) -> None:
    held = [
        {row.megatron for row in rows(mixture) if row.is_on_expert_rank(mixture, ep=2, rank=rank)} for rank in (0, 1)
    ]
    number = re.compile(r"local_experts\.(\d)\.")
    experts = [sorted({int(number.search(name)[1]) for name in names if number.search(name)}) for names in held]  # type: ignore[index]
    assert experts == [[0, 1], [2, 3]]
    everywhere = {name for name in held[0] if not number.search(name)}
    assert everywhere == {name for name in held[1] if not number.search(name)}
    assert "decoder.layers.1.mlp.router.weight" in everywhere


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_preflight_counts_a_ranks_experts(mixture: ModelShape, tp: int, pp: int) -> None:
    """An expert is whole on its rank, whatever the tensor parallelism of the attention."""
    layout = ParallelSection(tp=tp, pp=pp)
    one, two = (sum(part.parameters for part in stage_parameters(mixture, layout, ep=ep)) for ep in (1, 2))
    expert = 3 * 6 * 8
    assert one - two == mixture.num_layers * 2 * expert
    fc1 = find_row(mixture, "decoder.layers.0.mlp.experts.local_experts.2.linear_fc1.weight")
    assert fc1.shard_size(mixture, tp) == (12, 8)


def test_all_layers_and_experts_share_a_stored_tensor(mixture: ModelShape) -> None:
    """As Megatron-Core 0.16's SequentialMLP and TEGroupedMLP store them: axes for layers and experts go before."""
    stored = [row for row in stored_rows(mixture) if row.axis == "ep"]
    assert {row.key for row in stored} == {
        "decoder.layers.mlp.experts.linear_fc1.weight",
        "decoder.layers.mlp.experts.linear_fc2.weight",
    }
    places = [(row.layer, row.expert) for row in stored if row.key.endswith("fc2.weight")]
    assert places == [(layer, expert) for layer in range(2) for expert in range(4)]


def test_what_two_expert_ranks_hold_makes_up_the_model(mixture: ModelShape) -> None:
    """Every rank's part by the rows alone, and from the parts every tensor again."""
    tp, ep = 2, 2
    generator = torch.Generator().manual_seed(0)
    model = {name: torch.randn(size, generator=generator) for name, size in expected_tensors(mixture).items()}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for expert_rank in range(ep):
        for tensor_rank in range(tp):
            for row in stored_rows(mixture):
                if row.is_on_expert_rank(mixture, ep, expert_rank):
                    num_shards = row.num_shards(tp)
                    whole = [model[name] for name in row.names]
                    shard = row.layout.to_shard(whole, mixture, num_shards, tensor_rank % num_shards)
                    assert shard.shape == row.shard_size(mixture, tp)
                    parts.setdefault(row.megatron, {})[tensor_rank % num_shards] = shard
    back = {}
    for name, shards in parts.items():
        row = find_row(mixture, name)
        assert len(shards) == row.num_shards(tp)
        back |= zip(row.names, row.layout.to_whole([shards[i] for i in sorted(shards)], mixture), strict=True)
    assert back.keys() == model.keys()
    assert all(torch.equal(back[name], model[name]) for name in model)


def test_the_tables_need_no_torch() -> None:
    code = (
        "import sys; from megatron_fipo.convert.families import FAMILIES; import megatron_fipo.convert.hf_config; "
        "assert FAMILIES; print(sorted({'torch', 'megatron', 'safetensors'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert run.stdout.strip() == "[]", run.stderr
