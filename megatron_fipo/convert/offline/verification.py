"""Checks that folders hold the same weights, bit for bit, whatever format they are in; and checksums of each tensor."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fipo.config.text_files import read_json_object
from megatron_fipo.convert.dtypes import dtype_name
from megatron_fipo.convert.families import stored_rows
from megatron_fipo.convert.families.row import Parameter
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.hf_folder import CheckpointReader
from megatron_fipo.convert.hf_writer import model_files
from megatron_fipo.convert.inspection import inspect_folder
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.convert.offline.megatron_source import MegatronSource
from megatron_fipo.convert.problems import Problem, ProblemsError, not_finite
from megatron_fipo.convert.torch_dist import is_torch_dist
from megatron_fipo.system.disk import write_whole

Checksums = dict[str, dict[str, Any]]
"""name -> {"dtype", "shape", "sha256"}, of the Hugging Face tensor's bytes."""


@dataclass(frozen=True)
class Verified:
    """What a verification found.

    Attributes:
        problems: all that is wrong.
        checksums: those of the source's tensors.
        num_bytes: size of the source's tensors.
    """

    problems: list[Problem]
    checksums: Checksums
    num_bytes: int


class _Weights(Protocol):
    def read(self, row: Parameter) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of a row."""
        ...

    def file(self, row: Parameter) -> str:
        """The file or files that hold a row, after the folder's name."""
        ...


class _Folder:
    """A Hugging Face folder's weights by row."""

    def __init__(self, folder: Path, shape: ModelShape) -> None:
        self._reader = CheckpointReader(folder, shape)

    def read(self, row: Parameter) -> Iterator[tuple[str, Tensor]]:
        for name in row.names:
            yield name, self._reader.read(name)

    def file(self, row: Parameter) -> str:
        return ", ".join(sorted({self._reader.place(name) for name in row.names}))


def verify_weights(
    source: str | Path,
    others: Sequence[str | Path],
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    expected: Checksums | None = None,
    on_done: Callable[[int], None],
) -> Verified:
    """Check a Hugging Face folder, and that other folders hold the same. One parameter of each is in memory at a time.

    Args:
        others: Hugging Face folders and Megatron checkpoints.
        base: folder whose config.json counts for a Megatron checkpoint without one; None: `source`.
        dtype: dtype that the others were converted to; None: the source's.
        expected: checksums that the source must have; see `read_checksums`.
        on_done: called with the bytes of each of the source's tensors.

    Raises:
        ValueError: if a config.json cannot be read or describes a model that is not supported.
    """
    root = Path(source)
    shape, problems = inspect_folder(root)
    if problems:  # there is no use in comparing what is not whole
        return Verified(problems, {}, 0)
    compared: list[_Weights] = []
    for other in others:
        weights, found = _open(Path(other), root, shape, Path(base) if base else None)
        problems += found
        if weights is not None:
            compared.append(weights)
    checksums: Checksums = {}
    num_bytes = 0
    own = _Folder(root, shape)
    for row in stored_rows(shape):
        held = dict(own.read(row))
        for name, tensor in held.items():
            problems += not_finite(name, own.file(row), tensor)
            checksums[name] = _checksum(tensor)
            num_bytes += tensor.nbytes
            on_done(tensor.nbytes)
        for weights in compared:
            problems += _compare(row, held, weights, dtype)
    if expected is not None:
        problems += _compare_checksums(expected, checksums, root)
    return Verified(problems, checksums, num_bytes)


def read_checksums(file: str | Path) -> Checksums:
    """Read checksums that `write_checksums` wrote.

    Raises:
        ValueError: if the file is no such file.
    """
    try:
        tensors = read_json_object(Path(file)).get("tensors")
    except ValueError as error:
        raise ValueError(f"{file} is no file of checksums as --write-checksums writes them: {error}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{file} is no file of checksums as --write-checksums writes them: it has no tensors.")
    return tensors


def write_checksums(file: str | Path, checksums: Checksums) -> None:
    """Write checksums as JSON."""
    content = json.dumps({"algorithm": "sha256", "tensors": checksums}, indent=1) + "\n"
    write_whole(Path(file), content.encode())


def _open(folder: Path, source: Path, shape: ModelShape, base: Path | None) -> tuple[_Weights | None, list[Problem]]:
    """(the folder's weights, or None where they cannot be compared; what is wrong with the folder)."""
    try:
        if is_torch_dist(folder) or not any(folder.glob("*.safetensors")):
            if not (folder / "config.json").is_file():
                return MegatronSource(folder, read_model_shape(base or source)), []
            own_shape = read_model_shape(folder)
            weights = MegatronSource(folder, own_shape)
            problems = _compare_files(source, folder, shape)
            return (weights if own_shape == shape else None), problems
        found_shape, problems = inspect_folder(folder)
        problems += _compare_files(source, folder, shape)
        return (None if problems else _Folder(folder, found_shape)), problems
    except ProblemsError as error:
        return None, error.problems


def _compare_files(source: Path, folder: Path, shape: ModelShape) -> list[Problem]:
    """Compare config, tokenizer and the like. In config.json only the model counts: dtype and spelling may differ."""
    problems = []
    if read_model_shape(folder) != shape:
        detail = f"it describes {read_model_shape(folder)}; {source} describes {shape}"
        problems.append(Problem("different", "every tensor", f"{folder.name}/config.json", detail))
    for file in model_files(source):
        copy = folder / file.name
        if file.name != "config.json" and not copy.is_file():
            problems.append(Problem("missing", "no tensor", f"{folder.name}/{file.name}", f"{source} has it"))
        elif file.name != "config.json" and not filecmp.cmp(file, copy, shallow=False):
            problems.append(Problem("different", "no tensor", f"{folder.name}/{file.name}", f"not as in {source}"))
    return problems


def _compare(
    row: Parameter, held: dict[str, Tensor], weights: _Weights, dtype: torch.dtype | None
) -> Iterator[Problem]:
    try:
        for name, found in weights.read(row):
            expected = held[name].to(dtype) if dtype else held[name]
            yield from _differences(name, weights.file(row), expected, found)
    except ValueError as error:
        names = ", ".join(row.names)
        yield Problem("unreadable", names, weights.file(row), str(error))


def _differences(name: str, place: str, expected: Tensor, found: Tensor) -> Iterator[Problem]:
    if found.shape != expected.shape:
        detail = f"it is {list(found.shape)} and should be {list(expected.shape)}"
        yield Problem("shape", name, place, detail)
    elif found.dtype != expected.dtype:
        yield Problem("dtype", name, place, f"it is {found.dtype} and should be {expected.dtype}")
    elif not torch.equal(_bits(found), _bits(expected)):
        yield from not_finite(name, place, found)
        differ = _bits(found) != _bits(expected)
        first = differ.nonzero()[0].tolist()
        values = f"{float(found[tuple(first)])!r} instead of {float(expected[tuple(first)])!r}"
        detail = f"{int(differ.sum())} of {found.numel()} elements differ, the first at {first}: {values}"
        yield Problem("different", name, place, detail)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor as integers of its element size, so that NaN equals itself and 0 differs from -0."""
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _compare_checksums(expected: Checksums, found: Checksums, root: Path) -> Iterator[Problem]:
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield Problem("missing", name, str(root), "the file of checksums has it")
        elif name not in expected:
            yield Problem("extra", name, str(root), "the file of checksums does not have it")
        elif expected[name] != found[name]:
            detail = f"its checksum is {found[name]} and should be {expected[name]}"
            yield Problem("different", name, str(root), detail)


def _checksum(tensor: Tensor) -> dict[str, Any]:
    data: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return {
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "sha256": hashlib.sha256(data).hexdigest(),
    }
