"""The choice of a model's layers: Transformer Engine's, or Megatron's own with this project's attention.

Megatron-Core decides when it is imported whether Transformer Engine is there (HAVE_TE). This module follows it, says
why an installation cannot be used, and refuses to go without one where that would be slow and nobody asked for it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

import torch
from megatron.core.extensions import transformer_engine as extension
from megatron.core.utils import get_te_version

from megatron_fipo.config import Config, ModelSection, longest_sequence_tokens
from megatron_fipo.parallel.varlen_attention import kernel_in_words

LONGEST_UNASKED = 4096
"""The longest sequence, in tokens, for which a bfloat16 model on a GPU takes Megatron's own layers unasked."""
INSTALL = "python tools/engines/trainer_gpu.py"
"""The command that builds Transformer Engine against the installed torch."""


def uses_transformer_engine(model: ModelSection) -> bool:
    """Whether layers are Transformer Engine's: it needs CUDA, and half precision to attend to packed sequences."""
    return _wants_transformer_engine(model) and extension.HAVE_TE


def _wants_transformer_engine(model: ModelSection) -> bool:
    """Whether layers would be Transformer Engine's, were it installed."""
    return torch.cuda.is_available() and model.dtype == "bfloat16" and model.transformer_engine == "auto"


def import_error() -> str | None:
    """The reason why an installed Transformer Engine cannot be imported; None if it can be, or is not installed."""
    if extension.HAVE_TE or importlib.util.find_spec("transformer_engine") is None:
        return None
    try:
        importlib.import_module("transformer_engine.pytorch.fp8")  # what Megatron asks for
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return "Megatron-Core could not import it when it was imported itself"


def check_layers(config: Config) -> None:
    """Refuse to train without Transformer Engine where it is broken, or where its absence would make training slow.

    Raises:
        ValueError: in bfloat16 on a GPU, unless model.transformer_engine=off asks for Megatron's own layers.
    """
    if not _wants_transformer_engine(config.model) or extension.HAVE_TE:
        return
    otherwise = "set model.transformer_engine=off to train with Megatron's own layers"
    broken = import_error()
    if broken:
        raise ValueError(
            f"model.transformer_engine=auto: Transformer Engine is installed and cannot be imported ({broken}). Most "
            f"often it was built for another torch than the {torch.__version__} here: uninstall it and run "
            f"{INSTALL}, or {otherwise}."
        )
    demands = list(_demands(config))
    if demands:
        raise ValueError(
            f"model.transformer_engine=auto: Transformer Engine is not installed, and {' and '.join(demands)}. "
            "Megatron's own layers compute the same, slower: they rotate queries and keys sequence by sequence, keep "
            "more of each layer, and gather all keys of a context-parallel group on each of its ranks. "
            f"Run {INSTALL}, or {otherwise}."
        )


def _demands(config: Config) -> Iterator[str]:
    """Say, in words, each setting that makes Transformer Engine worth its installation."""
    if config.parallel.cp > 1:
        yield f"parallel.cp={config.parallel.cp} spreads sequences over GPUs"
    longest = longest_sequence_tokens(config)
    if longest > LONGEST_UNASKED:
        yield (
            f"sequences may have rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens (more than "
            f"{LONGEST_UNASKED})"
        )


def layers_in_use(model: ModelSection, head_dim: int) -> str:
    """One line that says whose layers and which attention a model has."""
    if uses_transformer_engine(model):
        # Which of its kernels it takes depends on the microbatch; it says so under this variable.
        return f"Transformer Engine {get_te_version()}; attention: its cuDNN or flash-attn (NVTE_DEBUG=1 tells)"
    dtype = getattr(torch, model.dtype)
    return f"Megatron's own; attention: {kernel_in_words(torch.cuda.is_available(), dtype, head_dim)}"
