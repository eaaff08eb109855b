"""Reads Megatron's torch_dist checkpoints, one tensor at a time, in one process and without Megatron.

The format is torch.distributed.checkpoint's: files of tensors, and a `.metadata` that says which part of which tensor
lies where. Megatron adds `metadata.json` and `common.pt`, and stores one tensor for all layers of a kind, of which a
layer's parameter is a slice.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_fipo.convert.checkpoint_pickles import read_metadata

_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile),
    *(AssertionError, AttributeError, LookupError, TypeError, ValueError),
)
"""Errors that torch raises where a file holds something other than its description says."""


def slice_of(shape: Sequence[int], layer: int | None) -> tuple[torch.Size, torch.Size]:
    """(offsets, sizes) of a slice in the stored tensor."""
    inside = torch.Size([0] * len(shape))
    if layer is None:
        return inside, torch.Size(shape)
    return torch.Size([layer, *inside]), torch.Size([1, *shape])


class _OneTensor(DefaultLoadPlanner):
    """Reads into one tensor, whatever name torch's planner asks for."""

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
        offsets, sizes = slice_of(whole if layer is None else whole[1:], layer)
        items = create_read_items_for_chunk_list(key, entry, [ChunkStorageMetadata(offsets, sizes)])
        found = sum(item.lengths.numel() for item in items)
        if found != sizes.numel():
            raise ValueError(f"{self.folder}: {key}, {_of(layer)}: {found} of {sizes.numel()} elements are stored.")
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _OneTensor(target)).wait()
        except _UNREADABLE as error:
            files = ", ".join(file.name for file in self.files(key, layer))
            # torch's message about a damaged pickle advises to trust it.
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
