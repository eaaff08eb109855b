"""Small random models in Hugging Face format, and plain reference computations on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

TINY: dict[str, Any] = {
    "vocab_size": 20,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "initializer_range": 0.2,
}


def save_random_model(folder: Path, family: str = "qwen2", seed: int = 0, **changes: Any) -> Path:
    """Write a random model whose norms and biases are not at their trivial initial values either."""
    config_class = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}[family]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config_class(**(TINY | changes))).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> PreTrainedModel:
    """The model in float32, by transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
