"""The rows that families of decoders share. A family's table names those that it has, and adds its own."""

from __future__ import annotations

from megatron_fipo.convert.families.row import HfTensor, Row
from megatron_fipo.convert.mapping import GatedMlp, GroupedQkv, Replicated, Size, Split, Vocabulary
from megatron_fipo.convert.model_shape import ModelShape

_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _hidden(shape: ModelShape) -> Size:
    return (shape.hidden_size,)


def _head(shape: ModelShape) -> Size:
    return (shape.head_dim,)


def _vocabulary(shape: ModelShape) -> Size:
    return (shape.vocab_size, shape.hidden_size)


def _into_mlp(shape: ModelShape) -> Size:
    return (shape.ffn_hidden_size, shape.hidden_size)


_INPUT_NORM = (HfTensor(f"{_HF_LAYER}input_layernorm.weight", _hidden),)
_MLP_NORM = (HfTensor(f"{_HF_LAYER}post_attention_layernorm.weight", _hidden),)
_QKV_WEIGHTS = (
    HfTensor(f"{_HF_LAYER}self_attn.q_proj.weight", lambda shape: (shape.query_size, shape.hidden_size)),
    HfTensor(f"{_HF_LAYER}self_attn.k_proj.weight", lambda shape: (shape.key_value_size, shape.hidden_size)),
    HfTensor(f"{_HF_LAYER}self_attn.v_proj.weight", lambda shape: (shape.key_value_size, shape.hidden_size)),
)
_QKV_BIASES = (
    HfTensor(f"{_HF_LAYER}self_attn.q_proj.bias", lambda shape: (shape.query_size,)),
    HfTensor(f"{_HF_LAYER}self_attn.k_proj.bias", lambda shape: (shape.key_value_size,)),
    HfTensor(f"{_HF_LAYER}self_attn.v_proj.bias", lambda shape: (shape.key_value_size,)),
)
_OUTPUT_WEIGHT = HfTensor(f"{_HF_LAYER}self_attn.o_proj.weight", lambda shape: (shape.hidden_size, shape.query_size))
_DOWN = HfTensor(f"{_HF_LAYER}mlp.down_proj.weight", lambda shape: (shape.hidden_size, shape.ffn_hidden_size))

OUTSIDE_LAYERS = (
    Row(
        "embedding.word_embeddings.weight",
        (HfTensor("model.embed_tokens.weight", _vocabulary),),
        Vocabulary(),
        axis="tp",
    ),
    Row("decoder.final_layernorm.weight", (HfTensor("model.norm.weight", _hidden),), Replicated(), axis=None),
    Row(
        "output_layer.weight",
        (HfTensor("lm_head.weight", _vocabulary),),
        Vocabulary(),
        axis="tp",
        exists=lambda shape: not shape.tied_embeddings,
    ),
)
"""Embedding, final norm and output layer."""

SEPARATE_NORMS = (
    Row(f"{_LAYER}input_layernorm.weight", _INPUT_NORM, Replicated(), axis=None, is_stored=False),
    Row(f"{_LAYER}pre_mlp_layernorm.weight", _MLP_NORM, Replicated(), axis=None, is_stored=False),
)
"""A layer's norms under the names that Megatron's own layers give them."""

ATTENTION_INPUT = (
    # Transformer Engine fuses each norm into the linear layer after it, under that layer's name.
    Row(f"{_LAYER}self_attention.linear_qkv.layer_norm_weight", _INPUT_NORM, Replicated(), axis=None),
    Row(f"{_LAYER}self_attention.linear_qkv.weight", _QKV_WEIGHTS, GroupedQkv(), axis="tp"),
    Row(
        f"{_LAYER}self_attention.linear_qkv.bias",
        _QKV_BIASES,
        GroupedQkv(),
        axis="tp",
        exists=lambda shape: shape.qkv_bias,
    ),
)
"""The norm before attention, and the projection to queries, keys and values."""

QK_NORMS = tuple(
    Row(
        f"{_LAYER}self_attention.{part}_layernorm.weight",
        (HfTensor(f"{_HF_LAYER}self_attn.{part}_norm.weight", _head),),
        Replicated(),
        axis=None,
        exists=lambda shape: shape.qk_norm,
    )
    for part in "qk"
)
"""The norms of each head of queries and keys."""

ATTENTION_OUTPUT = (
    Row(f"{_LAYER}self_attention.linear_proj.weight", (_OUTPUT_WEIGHT,), Split(1), axis="tp"),
    Row(
        f"{_LAYER}self_attention.linear_proj.bias",
        (HfTensor(f"{_HF_LAYER}self_attn.o_proj.bias", _hidden),),
        Replicated(),
        axis=None,
        exists=lambda shape: shape.output_bias,
    ),
)
"""The projection from all heads back to the hidden size."""

DENSE_MLP = (
    Row(f"{_LAYER}mlp.linear_fc1.layer_norm_weight", _MLP_NORM, Replicated(), axis=None),
    Row(
        f"{_LAYER}mlp.linear_fc1.weight",
        (
            HfTensor(f"{_HF_LAYER}mlp.gate_proj.weight", _into_mlp),
            HfTensor(f"{_HF_LAYER}mlp.up_proj.weight", _into_mlp),
        ),
        GatedMlp(),
        axis="tp",
    ),
    Row(f"{_LAYER}mlp.linear_fc2.weight", (_DOWN,), Split(1), axis="tp"),
)
"""The norm before the MLP, and one MLP with a gate."""

DENSE_DECODER = (*OUTSIDE_LAYERS, *SEPARATE_NORMS, *ATTENTION_INPUT, *ATTENTION_OUTPUT, *DENSE_MLP)
"""A dense decoder without norms of its heads."""
