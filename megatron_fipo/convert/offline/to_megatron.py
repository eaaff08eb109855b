"""A Hugging Face folder as a Megatron checkpoint, one tensor at a time.

What is written is what the actor itself would save: the same names and shapes, loadable in any layout. Config,
tokenizer and generation config go beside it, so that the way back needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.convert.families import StoredRow, expected_tensors, stored_rows
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.convert.hf_folder import CheckpointReader, copy_model_files
from megatron_fipo.convert.inspection import (
    ProblemsError,
    has_weights,
    inspect_folder,
    not_finite,
    stated_dtype,
)
from megatron_fipo.convert.plan import PROCESS_BYTES, Plan, PlannedTensor, being_written, check_target
from megatron_fipo.convert.torch_dist import EXTRA_STATE, Slice, plan_files, write_checkpoint

DEFAULT_FILE_BYTES = 2 * 1000**3
"""Of one file of the checkpoint: what a conversion that was killed has to do again at most."""

_LINEAR_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_FUSED_ATTENTION = "self_attention.core_attention"
"""Transformer Engine's attention asks for an extra state too; Megatron's own does not mind that there is one."""


@dataclass(frozen=True)
class ToMegatron:
    """A conversion that is checked and planned; `write` does it.

    Attributes:
        has_weights: False where only config.json was there, enough for a plan.
    """

    plan: Plan
    shape: ModelShape
    files: list[list[Slice]]
    dtype: torch.dtype | None
    has_weights: bool

    def write(self, on_written: Callable[[int], None]) -> None:
        """Convert. The target appears whole or not at all; a conversion that was killed is gone on from.

        Args:
            on_written: called with the bytes of each tensor that is done.

        Raises:
            ProblemsError: if a tensor holds NaN or infinity.
            ValueError: if another process writes the same target.
            OSError: if the disk is full or not writable; what is written stays for the next attempt.
        """
        assert self.has_weights, "there is nothing to convert"
        with being_written(self.plan) as folder:
            copy_model_files(self.plan.source, folder, self.dtype)
            write_checkpoint(folder, self.files, _extra_states(self.shape), on_written)


def plan_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = DEFAULT_FILE_BYTES,
    overwrite: bool = False,
    needs_weights: bool = True,
) -> ToMegatron:
    """Check a Hugging Face folder and plan its conversion, without reading weights.

    Args:
        dtype: of the result; None keeps the source's.
        file_bytes: a file of the result ends before the tensor that would make it larger.
        overwrite: whether `target` may exist; it is replaced when the conversion is done.
        needs_weights: False plans from config.json where there are no weights.

    Raises:
        ProblemsError: listing everything that is wrong with the folder.
        ValueError: if the folder cannot be used, or `target` may not be written.
    """
    root, goal = Path(source), Path(target)
    check_target(root, goal, overwrite)
    shape, problems = inspect_folder(root)
    found = has_weights(root)
    if found or needs_weights:
        if problems:
            raise ProblemsError(problems)
        reader = CheckpointReader(root, shape)
        slices = [
            _slice(stored, shape, dtype or reader.dtype(stored.row.hugging_face[0]), reader)
            for stored in stored_rows(shape)
        ]
    else:
        stated = dtype or stated_dtype(root)
        if stated is None:
            raise ValueError(f"{root / 'config.json'} states no dtype and there are no weights. Give one with --dtype.")
        slices = [_slice(stored, shape, stated, None) for stored in stored_rows(shape)]
    files = plan_files(slices, file_bytes)
    names = tuple(
        (f"__{number}_0.distcp", sum(piece.num_bytes for piece in pieces)) for number, pieces in enumerate(files)
    )
    # The source's tensors, mapped from their file, and beside them the parameter that is made of them.
    peak = PROCESS_BYTES + max(2 * piece.num_bytes for piece in slices)
    plan = Plan(root, goal, _stored_tensors(slices), names, peak)
    return ToMegatron(plan, shape, files, dtype, found)


def _slice(stored: StoredRow, shape: ModelShape, dtype: torch.dtype, reader: CheckpointReader | None) -> Slice:
    sizes = expected_tensors(shape)
    whole = [torch.empty(sizes[name], device="meta") for name in stored.row.hugging_face]
    size = tuple(stored.row.layout.to_shard(whole, shape, 1, 0).shape)
    read = partial(_read, stored, shape, dtype, reader)
    return Slice(stored.key, stored.layer, shape.num_layers, size, dtype, read)


def _read(stored: StoredRow, shape: ModelShape, dtype: torch.dtype, reader: CheckpointReader | None) -> Tensor:
    """The parameter of an unsharded model, from its Hugging Face tensors."""
    assert reader is not None, "planned without weights"
    whole = []
    for name in stored.row.hugging_face:
        tensor = reader.read(name).to(dtype)
        if problems := not_finite(name, reader.place(name), tensor):  # from the start, or too large for the dtype
            raise ProblemsError(problems)
        whole.append(tensor)
    return stored.row.layout.to_shard(whole, shape, 1, 0).contiguous()


def _stored_tensors(slices: list[Slice]) -> tuple[PlannedTensor, ...]:
    tensors = {piece.key: PlannedTensor(piece.key, tuple(piece.stored_shape), piece.dtype) for piece in slices}
    return tuple(tensors.values())


def _extra_states(shape: ModelShape) -> list[str]:
    layers = range(shape.num_layers)
    return [
        f"decoder.layers.{name}{EXTRA_STATE}/shard_{layer}_{shape.num_layers}"
        for layer in layers
        for name in (*_LINEAR_LAYERS, _FUSED_ATTENTION)
    ]
