"""Qwen2 and Qwen2.5: a bias on q, k and v, about which config.json says nothing."""

from __future__ import annotations

from megatron_fipo.convert.families.decoder import DENSE_DECODER
from megatron_fipo.convert.families.family import Family

FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    table=DENSE_DECODER,
    key_value_heads=32,
    always_has_qkv_bias=True,
    has_window_switch=True,
)
