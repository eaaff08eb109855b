"""Silences what other packages say at import and in passing that no user of this one can act on. Imported first."""

from __future__ import annotations

import logging
import warnings

from transformers.utils import logging as transformers_logging

for _message in (
    r"(Transformer Engine and )?Apex (is|are) not installed",  # optional here
    r".*torch\.distributed\.\w+` is deprecated",  # Megatron's calls; the new names are not in every supported torch
    r"The \.grad attribute of a Tensor that is not a leaf",  # Megatron's optimizer asks every parameter
    r"full scope is deprecated",  # Megatron's own default
    r"fp8_autocast is deprecated",  # Megatron's call, in every block
    r"MimoModelConfig is experimental",  # Megatron 0.19's import of what is not used here
    r"Using deprecated internal API from Transformer Engine",  # Megatron's import
):
    warnings.filterwarnings("ignore", message=_message)
# One progress bar for every load and save of a model would tear the run's own apart.
transformers_logging.disable_progress_bar()
logging.getLogger("megatron.core").setLevel(logging.ERROR)
