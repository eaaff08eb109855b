"""One table of names per model family."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.convert.mapping import GatedMlp, GroupedQkv, Replicated, Row, Split, Vocabulary

_ATTENTION = "model.layers.{layer}.self_attn."
_MLP = "model.layers.{layer}.mlp."

# The families share every name. They differ in which of the biases they have, and Qwen3 in its norms of q and k.
_DENSE_DECODER = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
    Row("output_layer.weight", ("lm_head.weight",), Vocabulary()),
    Row(
        "decoder.layers.{layer}.input_layernorm.weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        Replicated(),
        is_stored=False,
    ),
    # Transformer Engine fuses each norm into the linear layer behind it, under that layer's name.
    Row(
        "decoder.layers.{layer}.self_attention.linear_qkv.layer_norm_weight",
        ("model.layers.{layer}.input_layernorm.weight",),
        Replicated(),
    ),
    Row(
        "decoder.layers.{layer}.self_attention.linear_qkv.weight",
        tuple(f"{_ATTENTION}{part}_proj.weight" for part in "qkv"),
        GroupedQkv(),
    ),
    Row(
        "decoder.layers.{layer}.self_attention.linear_qkv.bias",
        tuple(f"{_ATTENTION}{part}_proj.bias" for part in "qkv"),
        GroupedQkv(),
    ),
    Row("decoder.layers.{layer}.self_attention.linear_proj.weight", (f"{_ATTENTION}o_proj.weight",), Split(1)),
    Row("decoder.layers.{layer}.self_attention.linear_proj.bias", (f"{_ATTENTION}o_proj.bias",), Replicated()),
    Row(
        "decoder.layers.{layer}.pre_mlp_layernorm.weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        Replicated(),
        is_stored=False,
    ),
    Row(
        "decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight",
        ("model.layers.{layer}.post_attention_layernorm.weight",),
        Replicated(),
    ),
    Row(
        "decoder.layers.{layer}.mlp.linear_fc1.weight",
        (f"{_MLP}gate_proj.weight", f"{_MLP}up_proj.weight"),
        GatedMlp(),
    ),
    Row("decoder.layers.{layer}.mlp.linear_fc2.weight", (f"{_MLP}down_proj.weight",), Split(1)),
)

_QK_NORM = tuple(
    Row(
        f"decoder.layers.{{layer}}.self_attention.{part}_layernorm.weight",
        (f"{_ATTENTION}{part}_norm.weight",),
        Replicated(),
    )
    for part in "qk"
)

TABLES = {"qwen2": _DENSE_DECODER, "llama": _DENSE_DECODER, "qwen3": _DENSE_DECODER + _QK_NORM}


def find_row(family: str, megatron_name: str, layer: int | None) -> Row:
    """The row of a parameter, with its layer number filled in.

    Args:
        megatron_name: the parameter's name with `{layer}` in place of the number.
        layer: global layer number, None outside the layers.

    Raises:
        KeyError: if the family's table has no such parameter.
    """
    for row in TABLES[family]:
        if row.megatron == megatron_name:
            return _of_layer(row, layer)
    raise KeyError(f"the {family} table has no row for the Megatron parameter {megatron_name}")


def _of_layer(row: Row, layer: int | None) -> Row:
    names = tuple(name.format(layer=layer) for name in row.hugging_face)
    return replace(row, megatron=row.megatron.format(layer=layer), hugging_face=names)


@dataclass(frozen=True)
class StoredRow:
    """One layer's part of a tensor of a Megatron checkpoint, and the Hugging Face tensors behind it.

    Attributes:
        key: the checkpoint's name of the tensor; that of a layer's parameter holds all layers, [num_layers, …].
        row: its row, with the layer number filled in.
        layer: index along the first dimension; None where the tensor belongs to no layer.
    """

    key: str
    row: Row
    layer: int | None


def stored_rows(shape: ModelShape) -> list[StoredRow]:
    """All that a Megatron checkpoint of this shape holds, in the order in which transformers writes its tensors."""
    expected = expected_tensors(shape)
    before: list[StoredRow] = []
    of_layers: list[StoredRow] = []
    after: list[StoredRow] = []
    for row in TABLES[shape.family]:
        if not row.is_stored:
            continue
        if "{layer}" in row.megatron:
            key = row.megatron.replace("{layer}.", "")
            filled = [(_of_layer(row, layer), layer) for layer in range(shape.num_layers)]
            of_layers += [StoredRow(key, part, layer) for part, layer in filled if part.hugging_face[0] in expected]
        elif row.hugging_face[0] in expected:
            (before if row.megatron.startswith("embedding.") else after).append(StoredRow(row.megatron, row, None))
    of_layers.sort(key=lambda stored: stored.layer or 0)  # stable: a layer's rows stay in the table's order
    return [*before, *of_layers, *after]


def expected_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of every tensor of a Hugging Face checkpoint of this shape (tied lm_head left out)."""
    hidden, kv = shape.hidden_size, shape.num_query_groups * shape.head_dim
    queries = shape.num_attention_heads * shape.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not shape.tied_embeddings:
        tensors["lm_head.weight"] = (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        attention, mlp = _ATTENTION.format(layer=layer), _MLP.format(layer=layer)
        tensors[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
        for part, rows in (("q", queries), ("k", kv), ("v", kv)):
            tensors[f"{attention}{part}_proj.weight"] = (rows, hidden)
            if shape.qkv_bias:
                tensors[f"{attention}{part}_proj.bias"] = (rows,)
        if shape.output_bias:
            tensors[f"{attention}o_proj.bias"] = (hidden,)
        if shape.qk_norm:
            tensors[f"{attention}q_norm.weight"] = tensors[f"{attention}k_norm.weight"] = (shape.head_dim,)
        tensors[f"{attention}o_proj.weight"] = (hidden, queries)
        tensors[f"{mlp}gate_proj.weight"] = tensors[f"{mlp}up_proj.weight"] = (shape.ffn_hidden_size, hidden)
        tensors[f"{mlp}down_proj.weight"] = (hidden, shape.ffn_hidden_size)
    return tensors
