"""The random weights of benchmarks/gpu_evidence.py."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.evidence.models import _fill


def filled(name: str) -> torch.Tensor:
    parameter = nn.Parameter(torch.empty(64))
    _fill(parameter, name, seed=0, tp_rank=0)
    return parameter.detach()


def test_a_norm_has_the_same_weights_in_transformer_engines_layers_and_in_megatrons() -> None:
    """Otherwise the two would be different models, and nothing could be said of their log-probs."""
    layer = "decoder.layers.3."
    norms = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    for transformer_engines, megatrons in norms.items():
        assert torch.equal(filled(layer + transformer_engines), filled(layer + megatrons))
    assert not torch.equal(*(filled(layer + name) for name in norms.values()))
