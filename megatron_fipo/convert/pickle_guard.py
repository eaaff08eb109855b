"""Unpickles what belongs in a checkpoint, and refuses by name what could run code.

A pickle may name any function and have it called. So each kind of pickle that a checkpoint holds has an unpickler
here that knows the classes which torch, Megatron-Core or Transformer Engine write there, and no others.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

_CHECKPOINT = "torch.distributed.checkpoint"
_WRITTEN_BY_TORCH = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),  # the folder it was written to; another module since Python 3.13
    ("pathlib._local", "PosixPath"),
    ("torch.serialization", "_get_layout"),
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.storage", "WriteResult"),
    *(
        (f"{_CHECKPOINT}.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *((f"{_CHECKPOINT}.planner", name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")),
}
"""Everything that `.metadata` names with Megatron-Core 0.16 and 0.19, besides dtypes: plain records, which run no
code."""

_LOADERS_OF_TENSORS = (
    ("torch.storage", "_load_from_bytes"),
    ("megatron.core.safe_globals", "safe_load_from_bytes"),
)
"""The functions that pickled tensors name: torch's own, and the one that Megatron-Core 0.19 puts in its place."""

_OF_TRANSFORMER_ENGINE = "transformer_engine."
_REBUILT = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("_codecs", "encode"),
}
"""Everything that Transformer Engine's state of FP8 names, besides its recipes' classes."""

_DAMAGE = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    EOFError,
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Errors that reading a damaged pickle may raise."""


class UntrustedCheckpointError(ValueError):
    """A checkpoint that would run code when it is opened. None of that code has run."""

    def __init__(self, file: Path, what: str) -> None:
        super().__init__(
            f"{file} names {what}, which no checkpoint of this project or of Megatron-Core does; opening it could run "
            "anything. Only open checkpoints that you would run. If this one is yours, something has changed it: "
            "restore it from a copy."
        )


def unpickle(data: bytes, file: Path) -> Any:
    """Unpickle what torch writes about a checkpoint; nothing else is called.

    Args:
        file: named in errors.

    Raises:
        UntrustedCheckpointError: if it names anything else, such as a Python function or a foreign class.
        ValueError: if it is no whole pickle.
    """
    reader = _TorchsRecords(io.BytesIO(data), file)
    try:
        return _unpickled(reader, file)
    finally:
        reader.check_unchanged()


def check_plain(data: bytes, file: Path) -> Any:
    """Read what torch saved, as plain values and tensors, and refuse anything else."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch also raises it for a class that is not on its list
        name = str(error).partition("GLOBAL ")[2].partition(" ")[0]
        if name:
            raise UntrustedCheckpointError(file, name) from error
        # torch's own message advises to trust the file.
        raise ValueError(f"{file} cannot be read: torch did not write it like this. Restore it from a copy.") from error
    except _DAMAGE as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def check_state(value: Any, file: Path, *, is_extra: bool) -> None:
    """Check a module's extra state: Transformer Engine pickles its own into a tensor and unpickles it unchecked.

    It unpickles the bytes of a tensor of any dtype. (From 2.20 on it refuses unknown classes itself.)

    Args:
        is_extra: whether the value is a module's extra state; of other values only uint8 tensors are checked.
    """
    if isinstance(value, (list, tuple)):
        for item in value:
            check_state(item, file, is_extra=is_extra)
    elif isinstance(value, io.BytesIO):
        check_plain(value.getvalue(), file)
    elif isinstance(value, torch.Tensor) and value.numel() and (is_extra or value.dtype == torch.uint8):
        _unpickled(_StateOfFp8(io.BytesIO(_bytes_of(value, file)), file), file)


def _bytes_of(tensor: torch.Tensor, file: Path) -> bytes:
    try:
        return tensor.cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse or quantized, which no state is
        raise ValueError(f"{file} holds a state that is no plain tensor ({error}). Restore it from a copy.") from error


def _unpickled(unpickler: pickle.Unpickler, file: Path) -> Any:
    try:
        return unpickler.load()
    except UntrustedCheckpointError:
        raise
    except _DAMAGE as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}: {error}). Restore it from a copy.") from error


class _TorchsRecords(pickle.Unpickler):
    """Unpickles the classes that torch writes into a checkpoint's description, and no others."""

    def __init__(self, stream: io.BytesIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file
        self._before: dict[str, tuple[Any, dict[str, Any]]] = {}
        """By name: each class or function found, and a copy of its attributes from before."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _WRITTEN_BY_TORCH or is_dtype:
            found = super().find_class(module, name)
            self._before.setdefault(f"{module}.{name}", (found, dict(getattr(found, "__dict__", {}))))
            return found
        raise UntrustedCheckpointError(self._file, f"{module}.{name}")

    def check_unchanged(self) -> None:
        """Undo and refuse changes of the named classes and functions: a pickle can set their attributes.

        Raises:
            UntrustedCheckpointError: if it has set any.
        """
        for name, (found, before) in self._before.items():
            now = dict(getattr(found, "__dict__", {}))
            changed = [key for key in now.keys() | before.keys() if now.get(key) is not before.get(key)]
            for key in changed:
                if key in before:
                    setattr(found, key, before[key])
                else:
                    delattr(found, key)
            if changed:
                raise UntrustedCheckpointError(self._file, f"a change of {name}")


class _StateOfFp8(pickle.Unpickler):
    """Reads the state only to look at it: recipes of Transformer Engine become records that do nothing."""

    def __init__(self, stream: io.BytesIO, file: Path) -> None:
        super().__init__(stream)
        self._file = file

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(_OF_TRANSFORMER_ENGINE) and "recipe" in module and "." not in name:
            return _Inert
        if (module, name) in _LOADERS_OF_TENSORS:  # they unpickle in turn
            return lambda data: check_plain(data, self._file)
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _REBUILT or is_dtype:
            return super().find_class(module, name)
        raise UntrustedCheckpointError(self._file, f"{module}.{name}")


class _Inert:
    """Stands in for an object of which nothing is used."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass
