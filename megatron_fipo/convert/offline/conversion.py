"""A conversion in either direction: planned first, then written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_fipo.convert.dtypes import stated_dtype
from megatron_fipo.convert.hf_writer import copy_model_files
from megatron_fipo.convert.plan import Plan, being_written

OnWritten = Callable[[int], None]
"""Called with the number of bytes of each tensor that is done."""


@dataclass(frozen=True)
class Conversion:
    """A conversion that is checked and planned; `write` does it.

    Attributes:
        plan: what will be written.
        base: the Hugging Face folder whose config, tokenizer and generation config go into the target.
        dtype: dtype of the written weights, which the target's config.json will state; None leaves what it says.
        write_weights: writes the weights into a folder; None where there was only a config.json to plan from.
    """

    plan: Plan
    base: Path
    dtype: torch.dtype | None
    write_weights: Callable[[Path, OnWritten], None] | None

    def write(self, on_written: OnWritten) -> None:
        """Convert. The target appears whole or not at all; a conversion that was killed is resumed.

        Raises:
            ProblemsError: if a tensor holds NaN or infinity.
            ValueError: if a tensor cannot be read, or another process writes the same target.
            OSError: if the disk is full or not writable; what is written stays for the next attempt.
        """
        assert self.write_weights is not None, "there is nothing to convert"
        with being_written(self.plan) as folder:
            copy_model_files(self.base, folder, self.dtype)
            self.write_weights(folder, on_written)


def dtype_without_weights(dtype: torch.dtype | None, folder: Path) -> torch.dtype:
    """The dtype to plan with where there is only a config.json: the one that was asked for, or the one it states.

    Raises:
        ValueError: if there is neither.
    """
    stated = dtype or stated_dtype(folder)
    if stated is None:
        raise ValueError(f"{folder / 'config.json'} states no dtype and there are no weights. Give one with --dtype.")
    return stated
