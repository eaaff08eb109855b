"""What backward computes again, one answer for the actor that does it and the plan that counts its memory and time."""

from __future__ import annotations

from typing import Literal

from megatron_fipo.config.schema import ModelSection

RecomputedPart = Literal["nothing", "core_attn", "mlp", "layer"]


def recomputed_part(model: ModelSection, *, on_gpu: bool) -> RecomputedPart:
    """The part of each layer that backward computes again; core_attn and mlp are Megatron's names.

    On GPUs in bfloat16 attention is fused, by Transformer Engine or by torch: it keeps its output and one number a row,
    no scores. To compute it again would cost the attention and give nothing back, so "selective" stands for the MLP
    there, whose 3 * ffn_hidden_size / tp numbers a token are the largest part of what a layer keeps.
    """
    if model.recompute == "none":
        return "nothing"
    if model.recompute == "full":
        return "layer"
    return "mlp" if on_gpu and model.dtype == "bfloat16" else "core_attn"
