"""Reads what a Hugging Face config.json says about a model, and checks that it can be trained here.

Every key that changes what the model computes is either applied or refused by name. If the trainer passed over a key
that a rollout engine applies, it would train another policy than the one that answers.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from megatron_fipo.config.text_files import read_json_object
from megatron_fipo.convert.families import FAMILIES
from megatron_fipo.convert.families.family import Family
from megatron_fipo.convert.hf_rope import rope_theta
from megatron_fipo.convert.model_shape import ModelShape

_SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")

_APPLIED = {
    *_SIZES,
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "rope_type",
    "partial_rotary_factor",
    "rotary_pct",
    "rope_partial_factor",
}
"""Keys that are read, here or in `hf_rope`."""

_WITHOUT_EFFECT = {
    "initializer_range",  # of random weights
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "is_llama_config",
    "attn_implementation",  # how, not what
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "use_flash_attn",
    "use_flash_attention",
    "use_flash_attention_2",
    "original_max_position_embeddings",  # of scaled RoPE, which is refused
    "max_window_layers",  # of sliding windows, which are refused
    "sliding_window",  # the same
}
"""Keys that look as if they changed the computation, and do not."""

_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "hidden_act": (("silu", "swish"), "only silu is supported"),
    "hidden_activation": (("silu", "swish"), "only silu is supported"),
    "use_sliding_window": ((), "sliding windows are not supported"),
    "mlp_bias": ((), "biases in the MLP are not supported"),
    "attention_dropout": ((0,), "dropout is not supported"),
    "pretraining_tp": ((0, 1), "weights that are multiplied in slices are not supported"),
    "quantization_config": ((), "quantized weights are not supported; take the model's unquantized folder"),
    "compression_config": ((), "quantized weights are not supported; take the model's unquantized folder"),
    "is_decoder": ((True,), "only decoders are supported"),
    "is_encoder_decoder": ((), "only decoders are supported"),
    "is_causal": ((True,), "only causal attention is supported"),
    "add_cross_attention": ((), "cross-attention is not supported"),
    "position_embedding_type": (("rope", "absolute"), "only RoPE is supported"),
    "transformers_weights": ((), "weights are read from model.safetensors or the files of its index"),
    "adapters": ((), "adapters are not applied; merge them into the weights first"),
    "peft_config": ((), "adapters are not applied; merge them into the weights first"),
}
"""Key -> (values that change nothing, besides null, false and empty ones; why any other value is refused)."""

_SPEAKS_OF_THE_COMPUTATION = re.compile(
    r"scal|drop|embd|multiplier|softcap|soft_cap|capping|expert|moe|rope|rotary|window|bias|norm|quant|attn|attention|mup"
    r"|alibi|residual|hidden|logit|embed|chunk|adapter|lora|mamba|ssm|conv|sparse|(^|_)mtp|nextn|layer|head|(^|_)act"
    r"|_act(_|$)|activation|router|gate|qkv|clip"
)
"""Pattern of the names of unknown keys that could change the computation if an engine applied them."""

_TELLS_ONLY = re.compile(
    r"_tokens?(_|$)|_token_id|tokenizer|version|_name|_path|date|note|^_commit|chunk_size_feed_forward"
)
"""Pattern of names that match the pattern above, but only describe the folder."""


def read_model_shape(folder: str | Path) -> ModelShape:
    """Read `folder`/config.json.

    Raises:
        ValueError: if there is none, it is no valid JSON, or it describes a model that is not supported; the message
            names the key.
    """
    path = Path(folder) / "config.json"
    raw = read_json_object(path, expected="A folder with a Hugging Face model was expected.")
    return model_shape(raw, str(path))


def model_shape(raw: dict[str, Any], place: str) -> ModelShape:
    """The shape of the model that a config.json describes.

    Args:
        raw: the content of config.json.
        place: names the file in errors.

    Raises:
        ValueError: if the model is not supported; the message names the key.
    """
    model_type = raw.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"{place}: model_type={model_type!r} is not supported; supported are {known}.")
    _check_architecture(raw, place, family)
    _check_switches(raw, place, family)
    sizes = {key: _whole_number(raw, place, key) for key in _SIZES}
    layer_types = raw.get("layer_types")
    if layer_types and len(layer_types) != sizes["num_hidden_layers"]:
        raise ValueError(
            f"{place}: layer_types names {len(layer_types)} layers and num_hidden_layers={sizes['num_hidden_layers']}. "
            "Whichever is wrong, correct it."
        )
    heads = sizes["num_attention_heads"]
    attention_bias = not family.always_has_qkv_bias and _switch(raw, place, "attention_bias")
    return ModelShape(
        family=family.name,
        num_layers=sizes["num_hidden_layers"],
        hidden_size=sizes["hidden_size"],
        ffn_hidden_size=sizes["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=_key_value_heads(raw, place, family, heads),
        head_dim=_head_dim(raw, place, family, heads),
        vocab_size=sizes["vocab_size"],
        max_position_embeddings=_whole_number(raw, place, "max_position_embeddings", 2048),
        rope_theta=rope_theta(raw, place),
        norm_epsilon=_positive(raw, place, "rms_norm_eps", 1e-6),
        tied_embeddings=_switch(raw, place, "tie_word_embeddings"),
        qkv_bias=family.always_has_qkv_bias or attention_bias,
        output_bias=attention_bias,
        qk_norm=family.has_qk_norm,
    )


def _check_architecture(raw: dict[str, Any], place: str, family: Family) -> None:
    """Engines choose the model's class by `architectures`, transformers by model_type: they must mean the same."""
    named = raw.get("architectures")
    if named and named != [family.architecture]:
        raise ValueError(
            f"{place}: architectures={named!r}: a {family.name} model that generates is [{family.architecture!r}], and "
            "rollout engines would run another. Take the folder of a model for text generation."
        )


def _check_switches(raw: dict[str, Any], place: str, family: Family) -> None:
    """Refuse whatever would change the computation and is not applied here."""
    for key, value in raw.items():
        if value is None or value is False or value in ([], {}, ""):
            continue
        neutral, reason = _NEUTRAL.get(key, (None, ""))
        if neutral is not None:
            if value not in neutral:
                raise ValueError(f"{place}: {key}={_short(value)}: {reason}.")
        elif key == "layer_types":
            if not isinstance(value, list) or any(kind != "full_attention" for kind in value):
                raise ValueError(f"{place}: layer_types={_short(value)}: only full attention is supported.")
        elif key == "sliding_window" and not family.has_window_switch:
            raise ValueError(f"{place}: sliding_window={value!r}: sliding windows are not supported.")
        elif key not in _APPLIED | _WITHOUT_EFFECT and _may_compute(key, value):
            raise ValueError(
                f"{place}: {key}={_short(value)}: a {family.name} model has no such key; it is not applied in "
                "training, and an engine might apply it. Delete it from a copy of config.json if the model does not "
                "need it."
            )


def _may_compute(key: str, value: Any) -> bool:
    """Whether a key that the family does not know could mean another computation."""
    name = key.lower()
    if not _SPEAKS_OF_THE_COMPUTATION.search(name) or _TELLS_ONLY.search(name):
        return False
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return True
    is_factor = re.search(r"scale|scaling|multiplier|factor", name)
    return value != (1 if is_factor else 0)


def _whole_number(raw: dict[str, Any], place: str, key: str, default: int | None = None) -> int:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{place}: {key}={value!r} should be a whole number.")
    if value < 1:
        raise ValueError(f"{place}: {key}={value!r} should be a whole number from 1 on.")
    return value


def _positive(raw: dict[str, Any], place: str, key: str, default: float) -> float:
    value = raw.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{place}: {key}={value!r} should be a number above 0.")
    return value


def _switch(raw: dict[str, Any], place: str, key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{place}: {key}={value!r} should be true or false.")
    return bool(value)


def _key_value_heads(raw: dict[str, Any], place: str, family: Family, heads: int) -> int:
    default = family.key_value_heads or heads
    groups = heads if raw.get("num_key_value_heads", default) is None else None
    groups = groups or _whole_number(raw, place, "num_key_value_heads", default)
    if heads % groups:
        raise ValueError(f"{place}: num_key_value_heads={groups} should divide num_attention_heads={heads}.")
    return groups


def _head_dim(raw: dict[str, Any], place: str, family: Family, heads: int) -> int:
    if raw.get("head_dim") is None:
        if family.head_dim is not None:
            return family.head_dim
        if raw["hidden_size"] % heads:
            raise ValueError(
                f"{place}: num_attention_heads={heads} should divide hidden_size={raw['hidden_size']}, or head_dim be "
                "given."
            )
        return int(raw["hidden_size"]) // heads
    head_dim = _whole_number(raw, place, "head_dim")
    if head_dim % 2:
        raise ValueError(f"{place}: head_dim={head_dim} should be even: RoPE rotates pairs.")
    return head_dim


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
