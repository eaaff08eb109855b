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


def test_a_folder_without_a_readable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist\. model\.path must be a folder"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_model_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    assert read_model_shape(tmp_path).num_layers == 28
