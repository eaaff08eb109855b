"""Megatron's torch_dist checkpoints, written and read one tensor at a time, in one process and without Megatron.

The format is torch.distributed.checkpoint's: files of tensors, and a `.metadata` that says which part of which tensor
lies where. Megatron adds `metadata.json` and `common.pt`, and stores one tensor for all layers of a kind, a layer's
parameter being a slice of it.

A checkpoint is written as several ranks would write it, one file each. The files are written one after the other, each
by torch's own writer, which asks for a tensor when its turn comes.
"""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_fipo.convert.checkpoint_pickles import read_metadata, unpickle
from megatron_fipo.convert.hf_folder import sync, write_text

EXTRA_STATE = "._extra_state"
"""End of the names under which linear layers store what is no tensor: nothing, here."""

_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile),
    *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
)
"""What torch raises where a file holds something else than its description says."""


@dataclass(frozen=True)
class Slice:
    """A part of a stored tensor that is written and read in one go.

    Attributes:
        key: name of the stored tensor.
        layer: index along its first dimension; None for the whole tensor.
        num_layers: size of its first dimension, where there is a layer.
        shape: of the slice, without the layers' dimension.
        read: gives the slice, when it is to be written.
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
        offsets, sizes = _slice_of(self.shape, self.layer)
        return ChunkStorageMetadata(offsets=offsets, sizes=sizes)

    @property
    def stored_shape(self) -> torch.Size:
        """Shape of the stored tensor."""
        return torch.Size(self.shape if self.layer is None else (self.num_layers, *self.shape))

    @property
    def index(self) -> MetadataIndex:
        """Its name in the metadata."""
        return MetadataIndex(self.key, self.chunk.offsets)


def _slice_of(shape: Sequence[int], layer: int | None) -> tuple[torch.Size, torch.Size]:
    """(offsets, sizes) of a slice in the stored tensor."""
    inside = torch.Size([0] * len(shape))
    if layer is None:
        return inside, torch.Size(shape)
    return torch.Size([layer, *inside]), torch.Size([1, *shape])


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
    """As Megatron stores the extra state of a layer that has none."""
    stream = io.BytesIO()
    torch.save([None], stream)
    stream.seek(0)
    return stream


def write_checkpoint(
    folder: Path, files: Sequence[Sequence[Slice]], extra_states: Sequence[str], on_written: Callable[[int], None]
) -> None:
    """Write a checkpoint; files that an earlier, killed call has finished are kept.

    Args:
        folder: exists; what goes on in it is the caller's to name and to rename.
        files: see `plan_files`; the same as in the earlier call.
        extra_states: names of what is no tensor, `<key>._extra_state/shard_<layer>_<layers>`.
        on_written: called with the bytes of each slice that is on its way into a file, or was there already.

    Raises:
        OSError: if the disk is full or not writable.
    """
    if is_torch_dist(folder) and not any(folder.glob("written-*")):
        for pieces in files:
            on_written(sum(piece.num_bytes for piece in pieces))
        return  # an earlier call was killed after its last word
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
            # torch's zip writer, closing in turn, turns the OSError of a failed write into a RuntimeError.
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(cause.errno, f"{cause.strerror}, at file {number} of {len(files)}", str(folder)) from error
        unfinished = record.with_suffix(".unfinished")
        unfinished.write_bytes(pickle.dumps(result))
        sync(unfinished)
        unfinished.rename(record)
        results.append(result)
    torch.save({}, folder / "common.pt")
    write_text(folder / "metadata.json", json.dumps(_FORMAT))
    writer.finish(metadata, results)
    for record in folder.glob("written-*"):
        record.unlink()


def _write_item(piece: Slice) -> WriteItem:
    data = TensorWriteData(piece.chunk, TensorProperties(dtype=piece.dtype), piece.stored_shape)
    return WriteItem(index=piece.index, type=WriteItemType.SHARD, tensor_data=data)


class _OneTensor(DefaultLoadPlanner):
    """Reads into one tensor, whatever torch's planner calls it."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self._target


class TorchDistReader:
    """The tensors of a torch_dist checkpoint, read one slice at a time, in whatever layout it was saved.

    Raises:
        UntrustedCheckpointError: if opening it would run code.
        ValueError: if the folder is no such checkpoint, or its description is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not is_torch_dist(self.folder):
            raise ValueError(f"{folder} is no whole torch_dist checkpoint: it has no .metadata with a metadata.json.")
        metadata = read_metadata(self.folder)
        self._reader = FileSystemReader(self.folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        stored = metadata.state_dict_metadata.items()
        self._tensors = {key: entry for key, entry in stored if isinstance(entry, TensorStorageMetadata)}
        self._storage = {(index.fqn, index.offset): info for index, info in metadata.storage_data.items()}

    @property
    def keys(self) -> list[str]:
        """Names of all stored tensors, the optimizer's included."""
        return list(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a stored tensor, layers first where it holds several."""
        return tuple(self._tensors[key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Dtype of a stored tensor."""
        return self._tensors[key].properties.dtype

    def files(self, key: str, layer: int | None) -> list[Path]:
        """The files that hold a slice."""
        chunks = self._tensors[key].chunks
        held = [chunk for chunk in chunks if layer is None or chunk.offsets[0] <= layer < _end(chunk)]
        return sorted({self.folder / self._storage[key, chunk.offsets].relative_path for chunk in held})

    def truncated(self) -> list[tuple[str, Path, str]]:
        """(key, file, what is wrong) of every stored part that lies beyond the end of its file."""
        problems = []
        sizes: dict[Path, int] = {}
        for (key, _), info in self._storage.items():
            file = self.folder / info.relative_path
            if file not in sizes:
                sizes[file] = file.stat().st_size if file.is_file() else -1
            end = info.offset + info.length
            if sizes[file] < end:
                found = "is not there" if sizes[file] < 0 else f"has {sizes[file]} bytes"
                problems.append((key, file, f"the file {found}; the tensor ends at byte {end}"))
        return problems

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """A stored tensor, or one layer of it, without the layers' dimension.

        Raises:
            ValueError: if the stored parts do not make up the tensor or cannot be read.
        """
        entry = self._tensors[key]
        whole = tuple(entry.size)
        offsets, sizes = _slice_of(whole if layer is None else whole[1:], layer)
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, sizes)])
        found = sum(item.lengths.numel() for item in items)
        if found != sizes.numel():
            raise ValueError(f"{self.folder}: {key}, {_of(layer)}: {found} of {sizes.numel()} elements are stored.")
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _OneTensor(target)).wait()
        except _UNREADABLE as error:
            files = ", ".join(file.name for file in self.files(key, layer))
            # What torch says of damaged pickles is advice to trust them.
            is_pickle = isinstance(error, pickle.UnpicklingError)
            reason = "torch has not saved a tensor there" if is_pickle else " ".join(str(error).split())
            raise ValueError(
                f"{self.folder}: {key}, {_of(layer)}, in {files}, cannot be read: {reason}. Restore it from a copy."
            ) from error
        return target if layer is None else target[0]


def _end(chunk: ChunkStorageMetadata) -> int:
    return chunk.offsets[0] + chunk.sizes[0]


def _of(layer: int | None) -> str:
    return "the whole tensor" if layer is None else f"layer {layer}"


def is_torch_dist(folder: Path) -> bool:
    """Whether a folder holds a whole torch_dist checkpoint."""
    return (folder / ".metadata").is_file() and (folder / "metadata.json").is_file()
