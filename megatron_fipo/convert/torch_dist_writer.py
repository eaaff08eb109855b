"""Writes Megatron's torch_dist checkpoints, one tensor at a time, in one process and without Megatron.

A checkpoint is written as several ranks would write it, one file each. The files are written one after the other, each
by torch's own writer, which asks for a tensor when its turn comes. See `torch_dist` for the format.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.convert.pickle_guard import unpickle
from megatron_fipo.convert.torch_dist import is_torch_dist, slice_of
from megatron_fipo.system.disk import write_whole

EXTRA_STATE = "._extra_state"
"""End of the names under which linear layers store state that is no tensor; here they have none."""

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Slice:
    """A part of a stored tensor that is written and read in one go.

    Attributes:
        key: name of the stored tensor.
        layer: index along the stored tensor's first dimension; None for the whole tensor.
        num_layers: size of the stored tensor's first dimension, where there is a layer.
        shape: size of the slice, without the layers' dimension.
        dtype: dtype of the slice and of the stored tensor.
        read: returns the slice; called when the slice is written.
    """

    key: str
    layer: int | None
    num_layers: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the slice."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where the slice lies in the stored tensor."""
        offsets, sizes = slice_of(self.shape, self.layer)
        return ChunkStorageMetadata(offsets=offsets, sizes=sizes)

    @property
    def stored_shape(self) -> torch.Size:
        """Shape of the stored tensor."""
        return torch.Size(self.shape if self.layer is None else (self.num_layers, *self.shape))

    @property
    def index(self) -> MetadataIndex:
        """Name and place of the slice in the metadata."""
        return MetadataIndex(self.key, self.chunk.offsets)


def plan_files(slices: Sequence[Slice], file_bytes: int) -> list[list[Slice]]:
    """Slices by file, in their order; a file ends before the slice that would make it larger than `file_bytes`."""
    files: list[list[Slice]] = []
    room = 0
    for piece in slices:
        if not files or piece.num_bytes > room:
            files.append([])
            room = file_bytes
        files[-1].append(piece)
        room -= piece.num_bytes
    return files


class _Planner(DefaultSavePlanner):
    """Reads a slice when torch's writer asks for it."""

    def __init__(self, slices: Sequence[Slice], on_written: Callable[[int], None]) -> None:
        super().__init__()
        self._slices = {piece.index: piece for piece in slices}
        self._on_written = on_written

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            return _nothing()
        piece = self._slices[write_item.index]
        tensor = piece.read()
        assert tensor.shape == piece.shape, f"{piece.key}: {tuple(tensor.shape)} instead of {piece.shape}"
        assert tensor.dtype == piece.dtype, f"{piece.key}: {tensor.dtype} instead of {piece.dtype}"
        self._on_written(piece.num_bytes)
        return tensor.reshape(piece.chunk.sizes)


def _nothing() -> io.BytesIO:
    """The extra state of a layer that has none, in the form in which Megatron stores it."""
    stream = io.BytesIO()
    torch.save([None], stream)
    stream.seek(0)
    return stream


def write_checkpoint(
    folder: Path, files: Sequence[Sequence[Slice]], extra_states: Sequence[str], on_written: Callable[[int], None]
) -> None:
    """Write a checkpoint; files that an earlier, killed call has finished are kept.

    Args:
        folder: exists; the caller gives it its final name when the checkpoint is whole.
        files: see `plan_files`; the same as in the earlier call.
        extra_states: names of the states that are no tensors, `<key>._extra_state/shard_<layer>_<layers>`.
        on_written: called with the bytes of each slice that is being written, or was written earlier.

    Raises:
        OSError: if the disk is full or not writable.
    """
    if is_torch_dist(folder) and not any(folder.glob("written-*")):
        for pieces in files:
            on_written(sum(piece.num_bytes for piece in pieces))
        return  # an earlier call finished the checkpoint and was then killed
    plans = [SavePlan([_write_item(piece) for piece in pieces]) for pieces in files]
    plans[0].items.extend(WriteItem(index=MetadataIndex(name), type=WriteItemType.BYTE_IO) for name in extra_states)
    # Nothing is read ahead: a tensor is asked for when the one before it is in the file, on hosts with CUDA too.
    writer = FileSystemWriter(folder, thread_count=1, per_thread_copy_ahead=0)
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    results: list[list[WriteResult]] = []
    for number, (plan, pieces) in enumerate(zip(plans, files, strict=True)):
        record = folder / f"written-{number:05d}.pickle"
        if record.is_file():
            for piece in pieces:
                on_written(piece.num_bytes)
            results.append(unpickle(record.read_bytes(), record))
            continue
        try:
            result: list[WriteResult] = writer.write_data(plan, _Planner(pieces, on_written)).wait()
        except (OSError, RuntimeError) as error:
            # After a failed write torch's zip writer raises a RuntimeError on closing; the OSError is its context.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, f"{cause.strerror}, at file {number} of {len(files)}", str(folder)) from error
        write_whole(record, pickle.dumps(result))
        results.append(result)
    torch.save({}, folder / "common.pt")
    write_whole(folder / "metadata.json", json.dumps(_FORMAT).encode())
    writer.finish(metadata, results)
    for record in folder.glob("written-*"):
        record.unlink()


def _write_item(piece: Slice) -> WriteItem:
    data = TensorWriteData(piece.chunk, TensorProperties(dtype=piece.dtype), piece.stored_shape)
    return WriteItem(index=piece.index, type=WriteItemType.SHARD, tensor_data=data)
