"""FP8: Transformer Engine computes the layers' matrix products, at twice bfloat16's rate and half its traffic.

Weights, their gradients, the optimizer's state, attention and the output layer are what they are without it. Only
recipes that take their scales from the tensor at hand are offered. Transformer Engine's delayed scaling takes them from
the steps before: the same weights and tokens would give other log-probs at another time, a step's first ratio would not
be 1, and a resumed run would not be the one that was stopped.

Source: Transformer Engine's documentation of Float8CurrentScaling, Float8BlockScaling and MXFP8BlockScaling;
DeepSeek-V3, arXiv 2412.19437, section 3.3, for the scaling by blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as extension

from megatron_fipo.actor.backend import INSTALL, import_error


@dataclass(frozen=True)
class _Recipe:
    """One recipe, as Megatron-Core and GPUs know it.

    Attributes:
        number_format: e4m3 throughout; or hybrid, which has e5m2 for gradients, because one scale for a whole tensor
            leaves e4m3 too little range.
        capability: the least compute capability of a GPU that computes it.
        gpus: the GPUs that have it, in words.
    """

    number_format: str
    capability: tuple[int, int]
    gpus: str


_RECIPES = {
    "tensorwise": _Recipe("hybrid", (8, 9), "Ada, Hopper and later GPUs"),
    "blockwise": _Recipe("e4m3", (9, 0), "Hopper and later GPUs"),
    "mxfp8": _Recipe("e4m3", (10, 0), "Blackwell and later GPUs"),
}


def fp8_options(recipe: str) -> dict[str, Any]:
    """The fields of Megatron's TransformerConfig that model.fp8 sets; none if it is "none"."""
    if recipe == "none":
        return {}
    return {
        "fp8": _RECIPES[recipe].number_format,
        "fp8_recipe": recipe,
        # Weights are cast anew for each microbatch, which takes little time beside its products. If the casts were
        # kept, they would take 2 bytes a weight, also while the rollout engine has the GPU.
        "disable_parameter_transpose_cache": True,
    }


def check_fp8(recipe: str) -> None:
    """Refuse a recipe that this process's device cannot compute.

    Raises:
        ValueError: without a GPU, without Transformer Engine, or on a GPU that is too old.
    """
    if recipe == "none":
        return
    remedy = "Set model.fp8=none to train in bfloat16 as it is."
    if not torch.cuda.is_available():
        raise ValueError(f"model.fp8={recipe}: FP8 needs {_RECIPES[recipe].gpus}, and there is no GPU here. {remedy}")
    if not extension.HAVE_TE:
        broken = import_error()
        state = f"cannot be imported ({broken})" if broken else "is not installed"
        raise ValueError(f"model.fp8={recipe}: FP8 is Transformer Engine's, which {state}. Run {INSTALL}. {remedy}")
    capability = torch.cuda.get_device_capability()
    if capability < _RECIPES[recipe].capability:
        others = [name for name, other in _RECIPES.items() if other.capability <= capability]
        raise ValueError(
            f"model.fp8={recipe}: needs {_RECIPES[recipe].gpus}, and {torch.cuda.get_device_name()} has compute "
            f"capability {capability[0]}.{capability[1]}. {f'Set model.fp8={others[-1]}.' if others else remedy}"
        )
