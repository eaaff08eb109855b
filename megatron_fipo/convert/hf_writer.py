"""Writes Hugging Face folders, one weight file at a time, and what belongs to a model besides its weights.

A folder has the name `<name>.partial` until it is whole.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_fipo.config.text_files import read_json_object
from megatron_fipo.convert.dtypes import SAFETENSORS_DTYPES
from megatron_fipo.convert.hf_folder import opened
from megatron_fipo.convert.weight_files import INDEX_FILE
from megatron_fipo.system.disk import put_file_in_place, write_whole

DEFAULT_SHARD_BYTES = 2 * 1000**3
"""Size of one safetensors file that is written, which is held in memory until it is full."""

_NOT_COPIED = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".distcp"}
_PART = re.compile(r"part-\d{5}\.safetensors")
_FINAL = re.compile(r"model(?:-(\d{5})-of-\d{5})?\.safetensors")


class ShardWriter:
    """Writes tensors into safetensors files of limited size, as they come.

    A file appears under its name when it is whole and on the disk, so the whole files that an earlier, killed writer
    left in the same folder are kept.

    Attributes:
        written: the names of the tensors that are in whole files.
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
        """Add one tensor, which is contiguous and on the CPU. A file is written when it is full.

        Raises:
            OSError: if the disk is full or not writable.
        """
        self.make_room(tensor.nbytes)
        self._held[name] = tensor
        self._held_bytes += tensor.nbytes

    def make_room(self, num_bytes: int) -> None:
        """Write the file now if a tensor of `num_bytes` will not fit into it. Call it before reading that tensor."""
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
            write_whole(self._folder / INDEX_FILE, (json.dumps(index, indent=2) + "\n").encode())
        for part, path in zip(self._parts, final, strict=True):
            part.rename(path)
        return final

    def _flush(self) -> None:
        part = self._folder / f"part-{len(self._parts) + 1:05d}.safetensors"
        unfinished = part.with_suffix(".unfinished")
        try:
            save_file(self._held, unfinished, metadata={"format": "pt"})
        except SafetensorError as error:  # raised for write errors, such as a full disk
            raise OSError(f"{unfinished} cannot be written: {error}") from error
        unfinished.chmod(_usual_mode())  # safetensors makes files that only their owner may read
        put_file_in_place(unfinished, part)
        self._parts.append(part)
        self.written |= self._held.keys()
        self._held, self._held_bytes = {}, 0


def _sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a file."""
    with opened(file) as handle:
        entries = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: torch.Size(entry.get_shape()).numel() * SAFETENSORS_DTYPES[entry.get_dtype()].itemsize
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
    """Copy the files that belong to a model besides its weights: config, tokenizer, generation config, licence.

    Args:
        dtype: the dtype of the weights, which config.json will state; None leaves what it says.
    """
    for file in model_files(source):
        shutil.copy2(file, target / file.name)
    if dtype is not None:
        note_dtype(target / "config.json", dtype)


def model_files(folder: Path) -> list[Path]:
    """The files that belong to a model besides its weights."""
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
    """Write into config.json which dtype the weights have."""
    config = read_json_object(config_file)
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    write_whole(config_file, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def partial_of(target: Path) -> Path:
    """The name under which a folder is written until it is whole."""
    return target.with_name(target.name + ".partial")
