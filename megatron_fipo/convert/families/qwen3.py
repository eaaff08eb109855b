"""Qwen3 without experts: each head of q and k is normalised, and has a size of its own."""

from __future__ import annotations

from megatron_fipo.convert.families.decoder import (
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    DENSE_MLP,
    OUTSIDE_LAYERS,
    QK_NORMS,
    SEPARATE_NORMS,
)
from megatron_fipo.convert.families.family import Family

FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    table=(*OUTSIDE_LAYERS, *SEPARATE_NORMS, *ATTENTION_INPUT, *QK_NORMS, *ATTENTION_OUTPUT, *DENSE_MLP),
    key_value_heads=32,
    head_dim=128,
    has_qk_norm=True,
    has_window_switch=True,
)
