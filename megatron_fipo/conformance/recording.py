"""Calls of FIPO's public code, recorded: what went in and what came out (recorded/README.md).

Shapes: B responses, L their longest; each row of a batch is one sequence that begins at its left edge.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig

FILES = tuple(sorted((Path(__file__).parent / "recorded").glob("*.npz")))
"""One file for each recording; its name without .npz is the case's."""


@dataclass(frozen=True, eq=False)
class Recording:
    """One call. Inputs are float32, outputs float64 as they were recorded."""

    case: str
    config: FipoConfig
    log_probs: Tensor
    """[B, L]."""
    old_log_probs: Tensor
    """[B, L]."""
    advantages: Tensor
    """[B, L], constant in a row."""
    response_mask: Tensor
    """bool [B, L]."""
    loss: float
    """Mean over the tokens of `final_mask`."""
    gradient: Tensor
    """[B, L], derivative of the loss by log_probs."""
    future_kl: Tensor
    """[B, L] F."""
    influence_weights: Tensor
    """[B, L] f."""
    token_loss: Tensor
    """[B, L], before the mean."""
    final_mask: Tensor
    """bool [B, L], response_mask without the sequences that the filter drops."""


def load(path: Path) -> Recording:
    """Read a recording."""
    with np.load(path) as file:
        entries = {name: torch.from_numpy(file[name]) for name in file.files if file[name].ndim == 2}
        config, mean = FipoConfig(**json.loads(str(file["config"]))), float(file["loss"])
    num_tokens = int(entries["final_mask"].sum())
    exact = (num_tokens + 1e-8) / num_tokens  # the public code divides by its tokens + 1e-8
    return Recording(
        case=path.stem,
        config=config,
        loss=mean * exact,
        gradient=entries["grad_log_probs"] * exact,
        **{name: entries[name].float() for name in ("log_probs", "old_log_probs", "advantages")},
        **{name: entries[name] for name in ("response_mask", "final_mask")},
        **{name: entries[name] for name in ("future_kl", "influence_weights", "token_loss")},
    )
