"""Llama, and models of other makers that are built like it, such as SmolLM2."""

from __future__ import annotations

from megatron_fipo.convert.families.decoder import DENSE_DECODER
from megatron_fipo.convert.families.family import Family

FAMILY = Family(name="llama", architecture="LlamaForCausalLM", table=DENSE_DECODER)
