"""What a Hugging Face config.json says about a dense decoder-only model, checked against what can be trained here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAMILIES = {"qwen2": "qwen2", "qwen3": "qwen3", "llama": "llama"}
"""config.json's model_type -> name of the conversion table."""

_QWEN3_HEAD_DIM = 128
"""What transformers assumes for a qwen3 config without head_dim, whatever the hidden size."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a dense decoder with grouped-query attention, RoPE, RMSNorm and SwiGLU.

    Attributes:
        qkv_bias: whether q, k and v have a bias. output_bias: whether o_proj has one.
        qk_norm: whether each head of q and k is normalised before RoPE.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    norm_epsilon: float
    tied_embeddings: bool
    qkv_bias: bool
    output_bias: bool = False
    qk_norm: bool = False

    def padded_vocab_size(self, tp_size: int) -> int:
        """Vocabulary rounded up so that each tensor-parallel rank holds a multiple of 128 rows."""
        multiple = 128 * tp_size
        return -(-self.vocab_size // multiple) * multiple


def read_model_shape(folder: str | Path) -> ModelShape:
    """Read `folder`/config.json.

    Raises:
        ValueError: if there is none, it is no valid JSON, or it describes a model that is not supported; the message
            names the key.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist. model.path must be a folder with a Hugging Face checkpoint.")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return model_shape(raw, str(path))


def model_shape(raw: dict[str, Any], place: str) -> ModelShape:
    """The same from a config that is read already; `place` names it in errors."""
    family = FAMILIES.get(raw.get("model_type", ""))
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{place}: model_type={raw.get('model_type')!r} is not supported; supported are {known}.")
    _refuse(raw, place, "hidden_act", raw.get("hidden_act", "silu") != "silu", "only silu is supported")
    _refuse(raw, place, "use_sliding_window", bool(raw.get("use_sliding_window")), "sliding windows are not supported")
    _refuse(raw, place, "mlp_bias", bool(raw.get("mlp_bias")), "biases in the MLP are not supported")
    _refuse(raw, place, "attention_dropout", bool(raw.get("attention_dropout")), "dropout is not supported")
    sliding = any(kind != "full_attention" for kind in raw.get("layer_types") or [])
    _refuse(raw, place, "layer_types", sliding, "only full attention is supported")
    for key in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"):
        if not isinstance(raw.get(key), int):
            raise ValueError(f"{place}: {key}={raw.get(key)!r} should be a whole number.")
    heads = raw["num_attention_heads"]
    default_head_dim = _QWEN3_HEAD_DIM if family == "qwen3" else raw["hidden_size"] // heads
    # Qwen2 has a bias on q, k and v and says so nowhere; where attention_bias exists, it means o_proj too.
    attention_bias = family != "qwen2" and bool(raw.get("attention_bias"))
    return ModelShape(
        family=family,
        num_layers=raw["num_hidden_layers"],
        hidden_size=raw["hidden_size"],
        ffn_hidden_size=raw["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or default_head_dim,
        vocab_size=raw["vocab_size"],
        max_position_embeddings=raw.get("max_position_embeddings", 2048),
        rope_theta=_rope_theta(raw, place),
        norm_epsilon=raw.get("rms_norm_eps", 1e-6),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        output_bias=attention_bias,
        qk_norm=family == "qwen3",
    )


def _refuse(raw: dict[str, Any], place: str, key: str, refused: bool, reason: str) -> None:
    if refused:
        raise ValueError(f"{place}: {key}={raw[key]!r}: {reason}.")


def _rope_theta(raw: dict[str, Any], place: str) -> float:
    """RoPE's base, from where transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters) writes it."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{place}: RoPE scaling of type {kind!r} is not supported; only plain RoPE is.")
    return float(rope.get("rope_theta", raw.get("rope_theta", 10000.0)))
