"""Converts a Megatron checkpoint into a Hugging Face folder, one tensor at a time and one weight file in memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.convert.families import stored_rows
from megatron_fipo.convert.families.row import Parameter
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.hf_writer import DEFAULT_SHARD_BYTES, ShardWriter
from megatron_fipo.convert.offline.conversion import Conversion, OnWritten, dtype_without_weights
from megatron_fipo.convert.offline.megatron_source import MegatronSource
from megatron_fipo.convert.plan import PROCESS_BYTES, Plan, PlannedTensor, check_target
from megatron_fipo.convert.problems import ProblemsError, not_finite
from megatron_fipo.convert.torch_dist import is_torch_dist


def plan_to_hugging_face(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    needs_weights: bool = True,
) -> Conversion:
    """Check a Megatron checkpoint and plan its conversion, without reading weights.

    Args:
        source: a converted checkpoint, or a run's checkpoints/step_NNNNNN.
        base: the folder that config, tokenizer and generation config are taken from; None: `source`.
        dtype: dtype of the result; None keeps the source's.
        shard_bytes: a file of the result ends before the tensor that would make it larger.
        overwrite: whether `target` may exist; it is replaced when the conversion is done.
        needs_weights: False plans from config.json where there is no checkpoint.

    Raises:
        ProblemsError: listing everything that is wrong with the checkpoint.
        ValueError: if the checkpoint cannot be used, or `target` may not be written.
    """
    root, goal, beside = Path(source), Path(target), Path(base or source)
    check_target(root, goal, overwrite)
    if not (beside / "config.json").is_file():
        raise ValueError(f"{beside} holds no config.json. Name the model's Hugging Face folder with --base.")
    shape = read_model_shape(beside)
    rows = stored_rows(shape)
    weights = MegatronSource(root, shape) if needs_weights or is_torch_dist(root) else None
    stored_dtype = weights.dtype if weights else dtype_without_weights(dtype, beside)
    result = dtype or stored_dtype
    tensors = tuple(PlannedTensor(name, size, result) for row in rows for name, size in row.tensors.items())
    peak = _peak_bytes(rows, stored_dtype, result, shard_bytes)
    plan = Plan(root, goal, tensors, _shards(tensors, shard_bytes), peak)
    return Conversion(plan, beside, result, partial(_write, weights, result, shard_bytes) if weights else None)


def _write(weights: MegatronSource, dtype: torch.dtype, shard_bytes: int, folder: Path, on_written: OnWritten) -> None:
    writer = ShardWriter(folder, shard_bytes)
    for row in weights.rows:
        sizes = {name: prod(size) * dtype.itemsize for name, size in row.tensors.items()}
        todo = [name for name in row.names if name not in writer.written]
        on_written(sum(sizes[name] for name in row.names if name not in todo))
        if not todo:
            continue
        writer.make_room(sizes[todo[0]])
        for name, tensor in weights.read(row):
            if name not in todo:
                continue
            converted = _compact(tensor.to(dtype))
            if problems := not_finite(name, weights.file(row), converted):
                raise ProblemsError(problems)  # not finite in the source, or too large for the dtype
            writer.add(name, converted)
            on_written(sizes[name])
    writer.finish()


def _peak_bytes(rows: Sequence[Parameter], stored_dtype: torch.dtype, dtype: torch.dtype, shard_bytes: int) -> int:
    """An estimate of the peak memory, in bytes.

    The tensors of a file are held until it is full, and beside them one parameter, as it is stored and as it is taken
    apart.
    """
    held = peak = 0
    for row in rows:
        numels = [prod(size) for size in row.tensors.values()]
        for numel in numels:
            held = held * (held + numel * dtype.itemsize <= shard_bytes)
            peak = max(peak, held + sum(numels) * (stored_dtype.itemsize + max(stored_dtype.itemsize, dtype.itemsize)))
            held += numel * dtype.itemsize
    return PROCESS_BYTES + peak


def _shards(tensors: tuple[PlannedTensor, ...], shard_bytes: int) -> tuple[tuple[str, int], ...]:
    """(name, bytes) of the files that `ShardWriter` will make of the tensors."""
    sizes: list[int] = []
    for tensor in tensors:
        if sizes and sizes[-1] + tensor.num_bytes <= shard_bytes:
            sizes[-1] += tensor.num_bytes
        else:
            sizes.append(tensor.num_bytes)
    if len(sizes) == 1:
        return (("model.safetensors", sizes[0]),)
    return tuple(
        (f"model-{number:05d}-of-{len(sizes):05d}.safetensors", size) for number, size in enumerate(sizes, start=1)
    )


def _compact(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in memory no larger than itself: what is kept until its file is written."""
    whole = tensor.contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()
