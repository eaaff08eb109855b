"""Looks through the pickles of a checkpoint before anything unpickles them.

torch's FileSystemReader unpickles `.metadata` as it is, and its planner the objects that lie between the tensors in the
.distcp files. Here `.metadata` is read with a list of the classes that torch writes into it; objects, and common.pt,
must pass torch's own reader of plain values (weights_only). Only then may torch's and Megatron's loaders have them. The
files that tensors are read from must lie in the checkpoint. See `pickle_guard` for the readers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_fipo.convert.pickle_guard import UntrustedCheckpointError, check_plain, check_state, unpickle

METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
_COMMON_STATE = "common_state/"
"""Prefix of the objects in which Megatron-Core 0.19 stores, among the tensors, what 0.16 writes into COMMON."""

_EXTRA_STATE = "_extra_state"
"""Part of the names of states that modules keep beside their weights."""


def read_metadata(folder: Path) -> Metadata:
    """Read which tensors and objects a checkpoint says that it holds, and where they lie.

    Raises:
        UntrustedCheckpointError: if that would run code, or points out of the folder.
        ValueError: if it cannot be read, is no metadata, or the checkpoint is of another format.
    """
    _check_format(folder / FORMAT)
    file = folder / METADATA
    if file.exists() and not file.is_file():  # reading a pipe would block
        raise ValueError(f"{file} is no file.")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
    metadata = unpickle(data, file)
    if not _has_the_form(metadata):
        raise ValueError(
            f"{file} is no description of a checkpoint. Restore it from a copy; without it the tensors are lost."
        )
    for info in metadata.storage_data.values():
        if Path(info.relative_path).name != info.relative_path:
            raise UntrustedCheckpointError(file, f"the file {info.relative_path!r} outside the checkpoint")
    return metadata


def check_pickles(folder: str | Path) -> None:
    """Look through everything of a torch_dist checkpoint that Megatron's loader would unpickle. No communication.

    Raises:
        UntrustedCheckpointError, ValueError: see `read_metadata`.
    """
    root = Path(folder)
    metadata = read_metadata(root)
    if (root / COMMON).is_file():
        check_plain((root / COMMON).read_bytes(), root / COMMON)
    elif not any(name.startswith(_COMMON_STATE) for name in metadata.state_dict_metadata):
        raise ValueError(f"{root / COMMON} is not there. Restore it from a copy.")
    for index, info in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            file = root / info.relative_path
            try:
                with file.open("rb") as stream:
                    stream.seek(info.offset)
                    data = stream.read(info.length)
            except OSError as error:
                raise ValueError(f"{file} cannot be read: {error.strerror}.") from error
            check_state(check_plain(data, file), file, is_extra=_EXTRA_STATE in index.fqn)


def _check_format(file: Path) -> None:
    """Refuse checkpoints of other backends: their loaders read other files, which nothing here has looked through."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        backends = raw["sharded_backend"], raw.get("common_backend", "torch")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} does not say which format the checkpoint has ({error!r}).") from error
    if backends not in (("torch_dist", "torch"), ("torch_dist", "torch_dist")):
        raise ValueError(f"{file}: checkpoints of format {backends[0]!r} are not supported; only torch_dist is.")


def _has_the_form(metadata: Any) -> bool:
    """Whether every field that is read later is there and has its type: a damaged record may have lost any of them."""
    try:
        stored, places = metadata.state_dict_metadata, metadata.storage_data
        return (
            isinstance(metadata, Metadata)
            and isinstance(stored, dict)
            and isinstance(places, dict)
            and all(isinstance(name, str) and _is_stored(entry) for name, entry in stored.items())
            and all(_is_index(index) and _is_place(info) for index, info in places.items())
        )
    except AttributeError:
        return False


def _is_stored(entry: Any) -> bool:
    if isinstance(entry, BytesStorageMetadata):
        return True
    return (
        isinstance(entry, TensorStorageMetadata)
        and isinstance(entry.size, torch.Size)
        and isinstance(entry.properties, TensorProperties)
        and isinstance(entry.properties.dtype, torch.dtype)
        and isinstance(entry.chunks, list)
        and all(
            isinstance(chunk, ChunkStorageMetadata)
            and isinstance(chunk.offsets, torch.Size)
            and isinstance(chunk.sizes, torch.Size)
            for chunk in entry.chunks
        )
    )


def _is_index(index: Any) -> bool:
    has_place = isinstance(index, MetadataIndex) and isinstance(index.offset, (torch.Size, type(None)))
    return has_place and isinstance(index.fqn, str)


def _is_place(info: Any) -> bool:
    return (
        isinstance(info, _StorageInfo)
        and isinstance(info.relative_path, str)
        and type(info.offset) is int
        and type(info.length) is int
        and min(info.offset, info.length) >= 0
        and not getattr(info, "transform_descriptors", None)
    )
