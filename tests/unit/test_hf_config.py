"""Reading config.json: what is understood, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.convert.hf_config import ModelShape, model_shape, read_model_shape
from tests.models import save_random_model

QWEN: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
"""As Qwen2.5-7B's file has it, in the spelling of transformers 4."""


def test_a_qwen_of_transformers_4() -> None:
    assert model_shape(QWEN, "config.json") == ModelShape(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        head_dim=128,
        vocab_size=152064,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        norm_epsilon=1e-6,
        tied_embeddings=False,
        qkv_bias=True,
    )


def test_the_rope_base_where_transformers_5_writes_it() -> None:
    raw = {key: value for key, value in QWEN.items() if key != "rope_theta"}
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": 500000.0}
    assert model_shape(raw, "").rope_theta == 500000.0
    assert model_shape({key: value for key, value in raw.items() if key != "rope_parameters"}, "").rope_theta == 10000.0


def test_what_a_file_may_leave_out() -> None:
    raw = {key: value for key, value in QWEN.items() if key != "num_key_value_heads"} | {"model_type": "llama"}
    shape = model_shape(raw, "")
    assert shape.num_query_groups == shape.num_attention_heads == 28
    assert not shape.qkv_bias
    assert model_shape(raw | {"head_dim": 64}, "").head_dim == 64


def test_qwen3_has_norms_of_q_and_k_and_heads_of_a_size_of_their_own() -> None:
    """As Qwen3-4B's file has it: 32 heads of 128 at a hidden size of 2560."""
    raw = QWEN | {"model_type": "qwen3", "hidden_size": 2560, "num_attention_heads": 32, "head_dim": 128}
    shape = model_shape(raw, "")
    assert (shape.family, shape.qk_norm, shape.head_dim) == ("qwen3", True, 128)
    assert not shape.qkv_bias
    assert not shape.output_bias
    assert model_shape({key: value for key, value in raw.items() if key != "head_dim"}, "").head_dim == 128


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_attention_bias_means_q_k_v_and_the_output(family: str) -> None:
    shape = model_shape(QWEN | {"model_type": family, "attention_bias": True}, "")
    assert shape.qkv_bias
    assert shape.output_bias


def test_qwen2_has_a_bias_on_q_k_and_v_alone() -> None:
    shape = model_shape(QWEN | {"attention_bias": True}, "")  # a key that transformers does not read there
    assert shape.qkv_bias
    assert not shape.output_bias
    assert not shape.qk_norm


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_what_transformers_writes_today_is_understood(tmp_path: Path, family: str) -> None:
    shape = read_model_shape(save_random_model(tmp_path / "model", family, tie_word_embeddings=True))
    assert shape.family == family
    assert (shape.num_layers, shape.hidden_size, shape.head_dim, shape.vocab_size) == (4, 32, 8, 20)
    assert shape.tied_embeddings
    assert shape.qkv_bias == (family == "qwen2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mixtral"}, "model_type='mixtral' is not supported; supported are llama, qwen2, qwen3"),
        ({"model_type": None}, "model_type=None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': only silu"),
        ({"use_sliding_window": True}, "use_sliding_window=True: sliding windows are not supported"),
        ({"mlp_bias": True}, "mlp_bias=True: biases in the MLP"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1: dropout"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers and num_hidden_layers="),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*: only full attention is supported"),
        ({"num_hidden_layers": None}, "num_hidden_layers=None should be a whole number"),
        ({"vocab_size": "many"}, "vocab_size='many' should be a whole number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "RoPE scaling of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}, "RoPE scaling of type 'llama3'"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        model_shape(QWEN | change, "folder/config.json")
    assert str(caught.value).startswith("folder/config.json: ")


PLAIN = {"rope_type": "default", "rope_theta": 1e6}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 4.0}},
            "RoPE scaling of type 'linear'",
        ),
        ({"rope_parameters": PLAIN, "rope_scaling": {"rope_type": "yarn", "factor": 4}}, "RoPE scaling of type 'yarn'"),
        ({"rope_parameters": PLAIN | {"type": "dynamic"}}, "RoPE scaling of type 'dynamic'"),
        (
            {"rope_scaling": {"rope_type": "default", "type": "mrope", "mrope_section": [1]}},
            "RoPE scaling of type 'mrope'",
        ),
        ({"rope_parameters": PLAIN | {"factor": 2.0}}, r"rope_parameters\.factor=2\.0"),
        ({"rope_parameters": PLAIN | {"low_freq_factor": 1.0}}, r"rope_parameters\.low_freq_factor"),
        ({"rope_parameters": {"full_attention": PLAIN}}, r"rope_parameters\.full_attention=.*kind of layer"),
        ({"rope_parameters": PLAIN | {"rope_theta": 5e5}}, "rope_parameters.rope_theta=500000.0, rope_theta=1000000.0"),
        ({"rope_theta": -1.0}, r"rope_theta=-1\.0 should be a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta='1e6' should be a number above 0"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\] should be an object"),
        ({"rope_type": "yarn"}, "RoPE scaling of type 'yarn'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported, only 1: vLLM"),
        ({"rope_parameters": PLAIN | {"partial_rotary_factor": 0.25}}, r"rope_parameters\.partial_rotary_factor=0\.25"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*quantized weights are not supported"),
        ({"pretraining_tp": 2}, "pretraining_tp=2"),
        ({"attention_multiplier": 0.5}, "attention_multiplier=0.5: a qwen2 model has no such key"),
        ({"logit_scale": 0.1}, "logit_scale=0.1"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ({"residual_multiplier": 2.0}, "residual_multiplier=2.0"),
        ({"num_experts": 8}, "num_experts=8"),
        ({"scale_emb": 12}, "scale_emb=12"),
        ({"model_type": "llama", "sliding_window": 4096}, "sliding_window=4096"),
        ({"model_type": "llama", "bias": True}, "bias=True"),
        ({"is_causal": False, "use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights="),
        ({"architectures": ["Qwen2ForSequenceClassification"]}, "architectures="),
        ({"num_attention_heads": 0}, "num_attention_heads=0 should be a whole number from 1 on"),
        ({"num_attention_heads": True}, "num_attention_heads=True should be a whole number"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5 should divide num_attention_heads=28"),
        ({"num_key_value_heads": "4"}, "num_key_value_heads='4' should be a whole number"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0 should be a number above 0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' should be true or false"),
        ({"hidden_size": 3585}, "num_attention_heads=28 should divide hidden_size=3585"),
        ({"head_dim": 7}, "head_dim=7 should be even"),
        ({"model_type": ["qwen2"]}, r"model_type=\['qwen2'\] is not supported"),
    ],
)
def test_every_key_that_computes_is_applied_or_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model_shape(QWEN | change, "folder/config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None, "partial_rotary_factor": 1.0},
        {"rope_parameters": PLAIN},
        {"rope_parameters": PLAIN, "rope_scaling": {"type": "default"}},
        {"sliding_window": 131072, "max_window_layers": 28, "layer_types": ["full_attention"] * 28},
        {"attention_dropout": 0.0, "hidden_dropout": 0, "residual_multiplier": 1.0, "num_experts": 0},
        {"architectures": ["Qwen2ForCausalLM"], "transformers_version": "4.43.1", "torch_dtype": "bfloat16"},
        {
            "_name_or_path": "x",
            "unsloth_fixed": True,
            "use_cache": False,
            "initializer_range": 0.02,
            "auto_map": {"a": "b"},
        },
        {
            "model_type": "llama",
            "is_llama_config": True,
            "rope_interleaved": False,
            "pretraining_tp": 1,
            "mlp_bias": False,
        },
        {"bos_token_id": 1, "eos_token_id": [1, 2], "id2label": {"0": "a"}, "max_length": 20, "temperature": 1.0},
    ],
)
def test_what_changes_nothing_is_no_reason_to_refuse(change: dict[str, Any]) -> None:
    assert model_shape(QWEN | change, "").rope_theta == 1e6


def test_a_scaling_table_without_a_base_means_the_default_one() -> None:
    """transformers 5 takes rope_scaling for all of rope_parameters, and 10,000 for the base it lacks."""
    raw = {key: value for key, value in QWEN.items() if key != "rope_theta"}
    with pytest.raises(ValueError, match=r"rope_parameters\.rope_theta=1000000\.0.*means 10000\.0"):
        model_shape(raw | {"rope_parameters": PLAIN, "rope_scaling": {"type": "default"}}, "")


@pytest.mark.parametrize("content", [b"[]", b"null", b'"text"', b"\xff", b"{", b"7"])
def test_a_file_that_holds_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json( is not valid JSON| holds a|, line 1: byte 0xff is no UTF-8)"):
        read_model_shape(tmp_path)


def test_a_folder_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"config\.json cannot be read: No such file.*A folder with a Hugging Face model was expected"
    ):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    assert read_model_shape(tmp_path).num_layers == 28
