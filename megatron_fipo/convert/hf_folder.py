"""Reads the weights of a Hugging Face folder, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fipo.convert.dtypes import FLOATS, SAFETENSORS_DTYPES
from megatron_fipo.convert.families import expected_tensors
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.convert.weight_files import INDEX_FILE, find_weight_files, first_of, is_buffer, tied_difference

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""Names of the two tensors that have a row for each token."""


class CheckpointReader:
    """The tensors of a Hugging Face folder, read one at a time, out of the files that transformers takes.

    A file is open, and mapped into memory, only while a tensor of it is in use. Buffers that early transformers stored
    are left out; see `weight_files`.

    Attributes:
        files: the files that hold the weights.

    Raises:
        ValueError: if the folder's tensors are not those that its config.json describes, naming the first that are
            missing, unexpected or of another shape, if it does not say which of its files to read, if one of them
            cannot be read, or if the output layer of a model with tied embeddings differs from the embedding.
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
                "or download the folder again."
            )
        with opened(file) as handle:
            for name in handle.keys():  # noqa: SIM118
                if is_buffer(name):
                    continue
                if owner_of is not None and owner_of.get(name) != file.name:
                    raise ValueError(
                        f"{self.folder}: {file.name} holds {name}, which {INDEX_FILE} "
                        f"{'puts into ' + owner_of[name] if name in owner_of else 'does not name'}. The index is of "
                        "another save of the model; copy or download the folder again."
                    )
                entry = handle.get_slice(name)
                if SAFETENSORS_DTYPES.get(entry.get_dtype()) not in FLOATS:
                    raise ValueError(
                        f"{file}: tensor {name} is {entry.get_dtype()}; supported are float32, float16 and bfloat16, "
                        "not quantized weights."
                    )
                self._file_of[name] = file
                self._shape_of[name] = tuple(entry.get_shape())
                self._dtype_of[name] = SAFETENSORS_DTYPES[entry.get_dtype()]
        lost = [] if owner_of is None else [n for n, f in owner_of.items() if f == file.name and n not in self._file_of]
        if lost := [name for name in lost if not is_buffer(name)]:
            raise ValueError(
                f"{self.folder}: {INDEX_FILE} puts {first_of(lost)} into {file.name}, which has no such tensor. Copy "
                "or download the folder again."
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
                "output layer of its own; otherwise take the tensor out of the file."
            )

    def read(self, name: str) -> Tensor:
        """One whole tensor, in the file's dtype."""
        with opened(self._file_of[name]) as handle:
            return handle.get_tensor(name)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of this name. Every tensor that config.json implies is there."""
        return name in self._file_of

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it."""
        return self._dtype_of[name]

    def place(self, name: str) -> str:
        """The file that holds a tensor, as `folder name/file name`."""
        return f"{self.folder.resolve().name}/{self._file_of[name].name}"


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A safetensors file, open.

    Raises:
        ValueError: if it is damaged or cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{file} is no whole safetensors file ({error}). Copy or download it again.") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}.") from error
