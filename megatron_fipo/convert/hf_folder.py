"""Hugging Face folders: safetensors files read one tensor at a time and written one file at a time.

A folder that is written goes by another name, `<name>.partial`, until it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_fipo.convert.families import expected_tensors
from megatron_fipo.convert.hf_config import ModelShape, read_object
from megatron_fipo.convert.weight_files import INDEX_FILE, find_weight_files, first_of, is_buffer, tied_difference

DEFAULT_SHARD_BYTES = 2 * 1000**3
"""Of one safetensors file that is written: what is held in memory while a folder is written."""

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""What weights may be stored in."""

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}
_PART = re.compile(r"part-\d{5}\.safetensors")
_FINAL = re.compile(r"model(?:-(\d{5})-of-\d{5})?\.safetensors")


class CheckpointReader:
    """The tensors of a Hugging Face folder, read one at a time, out of the files that transformers takes.

    A file is open, and mapped into memory, only while a tensor of it is in use. Buffers that early transformers stored
    are left out; see `weight_files`.

    Attributes:
        files: which files those are.

    Raises:
        ValueError: if the folder's tensors are not those that its config.json describes, naming the first that are
            missing, unexpected or of another shape, if it does not tell which of its files are meant, if a file of it
            cannot be read, or if the output layer is not the embedding that it is to be.
    """

    def __init__(self, folder: str | Path, shape: ModelShape) -> None:
        self.folder = Path(folder)
        self.files = find_weight_files(folder)
        self._file_of: dict[str, Path] = {}
        self._shape_of: dict[str, tuple[int, ...]] = {}
        self._dtype_of: dict[str, torch.dtype] = {}
        for file in self.files.files:
            self._note_tensors(file)
        self._check(expected_tensors(shape), shape)
        if shape.tied_embeddings and self.has(OUTPUT):
            self._check_tied_output()

    def _note_tensors(self, file: Path) -> None:
        owner_of = self.files.owner_of
        if owner_of is not None and not file.is_file():
            lost = [name for name, owner in owner_of.items() if owner == file.name]
            raise ValueError(
                f"{self.folder}: {INDEX_FILE} names {file.name}, which is not there. Missing: {first_of(lost)}. Copy "
                "or "
                "download the folder again."
            )
        with _opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if is_buffer(name):
                    continue
                if owner_of is not None and owner_of.get(name) != file.name:
                    raise ValueError(
                        f"{self.folder}: {file.name} holds {name}, which {INDEX_FILE} "
                        f"{'puts into ' + owner_of[name] if name in owner_of else 'does not name'}. The index is of "
                        "another "
                        "save of the model; copy or download the folder again."
                    )
                entry = handle.get_slice(name)
                if DTYPES.get(entry.get_dtype()) not in FLOATS:
                    raise ValueError(
                        f"{file}: tensor {name} is {entry.get_dtype()}; supported are float32, float16 and bfloat16, "
                        "not "
                        "quantized weights."
                    )
                self._file_of[name] = file
                self._shape_of[name] = tuple(entry.get_shape())
                self._dtype_of[name] = DTYPES[entry.get_dtype()]
        lost = [] if owner_of is None else [n for n, f in owner_of.items() if f == file.name and n not in self._file_of]
        if lost := [name for name in lost if not is_buffer(name)]:
            raise ValueError(
                f"{self.folder}: {INDEX_FILE} puts {first_of(lost)} into {file.name}, which has no such tensor. Copy "
                "or "
                "download the folder again."
            )

    def _check(self, expected: dict[str, tuple[int, ...]], shape: ModelShape) -> None:
        allowed = {OUTPUT} if shape.tied_embeddings else set()
        missing = sorted(expected.keys() - self._file_of.keys())
        extra = sorted(self._file_of.keys() - expected.keys() - allowed)
        if missing or extra:
            raise ValueError(
                f"{self.folder}: the weights do not fit config.json. Missing: {first_of(missing)}; unexpected: "
                f"{first_of(extra)}. The folder must hold one whole {shape.family} model."
            )
        for name, size in expected.items():
            if self._shape_of[name] != size:
                raise ValueError(
                    f"{self.folder}: tensor {name} has shape {self._shape_of[name]}; config.json implies {size}."
                )

    def _check_tied_output(self) -> None:
        if detail := tied_difference(self.read(EMBEDDING), self.read(OUTPUT)):
            raise ValueError(
                f"{self.folder}: config.json says tie_word_embeddings=true, so that {OUTPUT} is {EMBEDDING}, but "
                f"{self.place(OUTPUT)} holds another: {detail}. Set tie_word_embeddings=false if the model has an "
                "output "
                "layer of its own; otherwise take the tensor out of the file."
            )

    def read(self, name: str) -> Tensor:
        """One whole tensor, in the file's dtype."""
        with _opened(self._file_of[name]) as handle:
            return handle.get_tensor(name)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor; those that config.json implies are there."""
        return name in self._file_of

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it."""
        return self._dtype_of[name]

    def place(self, name: str) -> str:
        """The file that holds a tensor, behind the folder's name."""
        return f"{self.folder.resolve().name}/{self._file_of[name].name}"


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}). Copy or download it again.") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from error


class ShardWriter:
    """Writes tensors into safetensors files of limited size, as they come.

    A file appears under its name when it is whole and on the disk, so that what an earlier, killed writer left in the
    same folder can be gone on from: `written` names the tensors that are there.
    """

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        """
        Args:
            folder: exists; may hold the parts of an earlier writer.
            shard_bytes: a file ends before the tensor that would make it larger. A larger tensor has a file to itself.
        """
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        for file in list(folder.iterdir()):  # an earlier writer may have been killed while it gave the final names
            if final := _FINAL.fullmatch(file.name):
                file.rename(folder / f"part-{final[1] or '00001'}.safetensors")
        self._parts = [part for part in sorted(folder.iterdir()) if _PART.fullmatch(part.name)]
        self.written = {name for part in self._parts for name in _sizes(part)}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor, contiguous and on the CPU; a file is written when it is full.

        Raises:
            OSError: if the disk is full or not writable.
        """
        self.make_room(tensor.nbytes)
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes

    def make_room(self, num_bytes: int) -> None:
        """Write the file now if a tensor of so many bytes will not fit into it: before that tensor is read."""
        if self._held and self._held_bytes + num_bytes > self._shard_bytes:
            self._flush()

    def finish(self) -> list[Path]:
        """Write the rest and give all files their final names, with an index if there are several."""
        if self._held:
            self._flush()
        count = len(self._parts)
        if count == 1:
            final = [self._folder / "model.safetensors"]
        else:
            final = [self._folder / f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
            sizes = {path.name: _sizes(part) for part, path in zip(self._parts, final, strict=True)}
            file_of = {name: file for file, tensors in sizes.items() for name in tensors}
            index = {
                "metadata": {"total_size": sum(sum(tensors.values()) for tensors in sizes.values())},
                "weight_map": dict(sorted(file_of.items())),
            }
            write_text(self._folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        for part, path in zip(self._parts, final, strict=True):
            part.rename(path)
        return final

    def _flush(self) -> None:
        part = self._folder / f"part-{len(self._parts) + 1:05d}.safetensors"
        unfinished = part.with_suffix(".unfinished")
        try:
            save_file(self._held, unfinished, metadata={"format": "pt"})
        except SafetensorError as error:  # what its own writing meets, such as a full disk
            raise OSError(f"{unfinished} cannot be written: {error}") from error
        unfinished.chmod(_usual_mode())  # safetensors makes files that only their owner may read
        sync(unfinished)
        unfinished.rename(part)
        self._parts.append(part)
        self.written |= self._held.keys()
        self._held, self._held_bytes = {}, 0


def _sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a file."""
    with _opened(file) as handle:
        entries = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: torch.Size(entry.get_shape()).numel() * DTYPES[entry.get_dtype()].itemsize
            for name, entry in entries.items()
        }


def _usual_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def own_memory(tensor: Tensor) -> Tensor:
    """The tensor on the CPU, contiguous, in memory that is no larger than itself and that nothing else changes."""
    whole = tensor.detach().cpu().contiguous()
    is_alone = whole.data_ptr() != tensor.data_ptr() and whole.untyped_storage().nbytes() == whole.nbytes
    return whole if is_alone else whole.clone()


def copy_model_files(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy what belongs to a model besides its weights: config, tokenizer, generation config, licence.

    Args:
        dtype: of the weights, noted in config.json; None leaves what it says.
    """
    for file in model_files(source):
        shutil.copy2(file, target / file.name)
    if dtype is not None:
        note_dtype(target / "config.json", dtype)


def model_files(folder: Path) -> list[Path]:
    """What belongs to a model besides its weights."""
    of_a_checkpoint = {"metadata.json", ".metadata"}
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix not in _NOT_COPIED
        and not file.name.endswith(".index.json")
        and file.name not in of_a_checkpoint
    ]


def note_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """Say in config.json which dtype the weights have."""
    config = read_object(config_file)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_text(config_file, json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_text(file: Path, text: str) -> None:
    """Write a small file so that it is either as before or whole."""
    unfinished = file.with_name(file.name + ".unfinished")
    unfinished.write_text(text)
    sync(unfinished)
    unfinished.rename(file)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_of(target: Path) -> Path:
    """The name under which a folder is written until it is whole."""
    return target.with_name(target.name + ".partial")


def publish(target: Path) -> None:
    """Give a whole folder its name. One that has the name is gone only when the new one has it."""
    partial, replaced = partial_of(target), target.with_name(target.name + ".replaced")
    sync(partial)
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)
