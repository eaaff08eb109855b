"""Number formats by the names that a configuration has for them."""

from __future__ import annotations

import torch

MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Values of `model.dtype`, and what the model is held in."""
