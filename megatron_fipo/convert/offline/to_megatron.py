"""Converts a Hugging Face folder into a Megatron checkpoint, one tensor at a time.

What is written is what the actor itself would save: the same names and shapes, loadable in any layout. Config,
tokenizer and generation config go beside it, so that the way back needs nothing else.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.convert.families import stored_rows
from megatron_fipo.convert.families.row import Parameter
from megatron_fipo.convert.hf_folder import CheckpointReader
from megatron_fipo.convert.inspection import has_weights, inspect_folder
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.convert.offline.conversion import Conversion, OnWritten, dtype_without_weights
from megatron_fipo.convert.plan import PROCESS_BYTES, Plan, PlannedTensor, check_target
from megatron_fipo.convert.problems import ProblemsError, not_finite
from megatron_fipo.convert.torch_dist_writer import EXTRA_STATE, Slice, plan_files, write_checkpoint

DEFAULT_FILE_BYTES = 2 * 1000**3
"""Size of one file of the checkpoint: a conversion that was killed repeats at most one file."""

_LINEAR_LAYERS = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
_FUSED_ATTENTION = "self_attention.core_attention"
"""Transformer Engine's attention asks for an extra state too; Megatron's own ignores it."""


def plan_to_megatron(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    file_bytes: int = DEFAULT_FILE_BYTES,
    overwrite: bool = False,
    needs_weights: bool = True,
) -> Conversion:
    """Check a Hugging Face folder and plan its conversion, without reading weights.

    Args:
        dtype: dtype of the result; None keeps the source's.
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
    reader = None
    if needs_weights or has_weights(root):
        if problems:
            raise ProblemsError(problems)
        reader = CheckpointReader(root, shape)
        slices = [_slice(row, shape, dtype or reader.dtype(row.names[0]), reader) for row in stored_rows(shape)]
    else:
        stated = dtype_without_weights(dtype, root)
        slices = [_slice(row, shape, stated, None) for row in stored_rows(shape)]
    files = plan_files(slices, file_bytes)
    names = tuple(
        (f"__{number}_0.distcp", sum(piece.num_bytes for piece in pieces)) for number, pieces in enumerate(files)
    )
    # The source's tensors, mapped from their file, and beside them the parameter that is made of them.
    peak = PROCESS_BYTES + max(2 * piece.num_bytes for piece in slices)
    plan = Plan(root, goal, _stored_tensors(slices), names, peak)
    return Conversion(plan, root, dtype, None if reader is None else partial(_write, files, shape))


def _write(files: list[list[Slice]], shape: ModelShape, folder: Path, on_written: OnWritten) -> None:
    write_checkpoint(folder, files, _extra_states(shape), on_written)


def _slice(row: Parameter, shape: ModelShape, dtype: torch.dtype, reader: CheckpointReader | None) -> Slice:
    read = partial(_read, row, shape, dtype, reader)
    return Slice(row.key, row.layer, shape.num_layers, row.shard_size(shape, tp=1), dtype, read)


def _read(row: Parameter, shape: ModelShape, dtype: torch.dtype, reader: CheckpointReader | None) -> Tensor:
    """The parameter of an unsharded model, from its Hugging Face tensors."""
    assert reader is not None, "planned without weights"
    whole = []
    for name in row.names:
        tensor = reader.read(name).to(dtype)
        # Not finite in the source, or too large for the dtype.
        if problems := not_finite(name, reader.place(name), tensor):
            raise ProblemsError(problems)
        whole.append(tensor)
    return row.layout.to_shard(whole, shape, 1, 0).contiguous()


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
