"""A Megatron checkpoint as a Hugging Face folder, one tensor at a time and one weight file in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fipo.convert.families import StoredRow, expected_tensors, stored_rows
from megatron_fipo.convert.hf_config import ModelShape, read_model_shape
from megatron_fipo.convert.hf_folder import DEFAULT_SHARD_BYTES, FLOATS, ShardWriter, copy_model_files
from megatron_fipo.convert.inspection import Problem, ProblemsError, not_finite, placed, stated_dtype
from megatron_fipo.convert.plan import PROCESS_BYTES, Plan, PlannedTensor, being_written, check_target
from megatron_fipo.convert.torch_dist import TorchDistReader, is_torch_dist

_OPTIMIZER = "optimizer."
"""Begins the names of what a training checkpoint stores besides the model."""


class MegatronSource:
    """A Megatron checkpoint's weights as Hugging Face tensors.

    Attributes:
        shape: of the model. folder: of the checkpoint.
    """

    def __init__(self, folder: str | Path, shape: ModelShape) -> None:
        """
        Raises:
            ValueError: if the folder is no torch_dist checkpoint.
            ProblemsError: listing what is missing, unmapped, cut off, or of another shape or dtype.
        """
        self.folder, self.shape = Path(folder), shape
        self._reader = TorchDistReader(folder)
        self._rows = stored_rows(shape)
        self._is_by_layer = any(key.startswith("decoder.layers.0.") for key in self._reader.keys)
        if problems := self._problems():
            raise ProblemsError(placed(problems, self.folder))

    @property
    def num_bytes(self) -> int:
        """Of all weights, as Hugging Face tensors in the checkpoint's dtype."""
        return sum(torch.Size(size).numel() * self.dtype.itemsize for size in expected_tensors(self.shape).values())

    @property
    def dtype(self) -> torch.dtype:
        """Of all weights."""
        return self._reader.dtype(self._place(self._rows[0])[0])

    def rows(self) -> list[StoredRow]:
        """All that there is to read, in the order in which transformers writes it."""
        return self._rows

    def read(self, stored: StoredRow) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face name, tensor) of a row.

        Raises:
            ValueError: if it cannot be read.
        """
        parameter = self._reader.read(*self._place(stored))
        yield from zip(stored.row.hugging_face, stored.row.layout.to_whole([parameter], self.shape), strict=True)

    def file(self, stored: StoredRow) -> str:
        """The files that hold a row, behind the checkpoint's name."""
        return f"{self.folder.resolve().name}/{self._files(stored)}"

    def _files(self, stored: StoredRow) -> str:
        return ", ".join(file.name for file in self._reader.files(*self._place(stored)))

    def _place(self, stored: StoredRow) -> tuple[str, int | None]:
        """(name, layer): Megatron stores either one tensor for all layers or one for each."""
        if stored.layer is not None and self._is_by_layer:
            return stored.row.megatron, None
        return stored.key, stored.layer

    def _problems(self) -> list[Problem]:
        present, metadata = set(self._reader.keys), ".metadata"
        problems, known, dtypes = [], set(), {}
        for stored in self._rows:
            key, layer = self._place(stored)
            if key not in present:
                if key not in known:
                    problems.append(Problem("missing", key, metadata, f"the {self.shape.family} table implies it"))
            else:
                problems += self._check_size(stored, key, layer)
                dtypes[key] = self._reader.dtype(key)
            known.add(key)
        common = next(iter(dtypes.values()), torch.float32)
        for key, dtype in dtypes.items():
            if dtype not in FLOATS or dtype != common:
                expected = f"{common}, as others are" if common in FLOATS else "float32, float16 or bfloat16"
                problems.append(Problem("dtype", key, metadata, f"it is {dtype}; expected is {expected}"))
        for key in sorted(present - known):
            if not key.startswith(_OPTIMIZER):
                problems.append(
                    Problem("unmapped", key, metadata, f"config.json's {self.shape.family} model has no such parameter")
                )
        for key, file, detail in self._reader.truncated():
            if not key.startswith(_OPTIMIZER):
                problems.append(Problem("truncated", key, file.name, detail))
        return problems

    def _check_size(self, stored: StoredRow, key: str, layer: int | None) -> list[Problem]:
        sizes = expected_tensors(self.shape)
        whole = [torch.empty(sizes[name], device="meta") for name in stored.row.hugging_face]
        expected = tuple(stored.row.layout.to_shard(whole, self.shape, 1, 0).shape)
        if layer is not None:
            expected = (self.shape.num_layers, *expected)
        found, place = self._reader.shape(key), self._files(stored)
        if key in ("embedding.word_embeddings.weight", "output_layer.weight") and found[1:] == expected[1:]:
            if found[0] >= self.shape.vocab_size:  # padded for another layout
                return []
            detail = f"it has {found[0]} rows; config.json says vocab_size={self.shape.vocab_size}"
            return [Problem("vocabulary", key, place, detail)]
        if found == expected or stored.layer:  # said once, for layer 0
            return []
        return [Problem("shape", key, place, f"it is {list(found)}; config.json implies {list(expected)}")]


@dataclass(frozen=True)
class ToHuggingFace:
    """A conversion that is checked and planned; `write` does it."""

    plan: Plan
    shard_bytes: int
    base: Path
    dtype: torch.dtype
    source: MegatronSource | None

    def write(self, on_written: Callable[[int], None]) -> None:
        """Convert. The target appears whole or not at all; a conversion that was killed is gone on from.

        Args:
            on_written: called with the bytes of each tensor that is done.

        Raises:
            ProblemsError: if a tensor holds NaN or infinity.
            ValueError: if a tensor cannot be read, or another process writes the same target.
            OSError: if the disk is full or not writable; what is written stays for the next attempt.
        """
        assert self.source is not None, "there is nothing to convert"
        with being_written(self.plan, dtype=str(self.dtype)) as folder:
            copy_model_files(self.base, folder, self.dtype)
            writer = ShardWriter(folder, self.shard_bytes)
            sizes = {tensor.name: tensor.num_bytes for tensor in self.plan.tensors}
            for stored in self.source.rows():
                todo = [name for name in stored.row.hugging_face if name not in writer.written]
                on_written(sum(sizes[name] for name in stored.row.hugging_face if name not in todo))
                if not todo:
                    continue
                writer.make_room(sizes[todo[0]])
                for name, tensor in self.source.read(stored):
                    if name not in todo:
                        continue
                    converted = _compact(tensor.to(self.dtype))
                    if problems := not_finite(name, self.source.file(stored), converted):
                        raise ProblemsError(problems)  # from the start, or too large for the dtype
                    writer.add(name, converted)
                    on_written(sizes[name])
            writer.finish()


def plan_to_hugging_face(
    source: str | Path,
    target: str | Path,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    needs_weights: bool = True,
) -> ToHuggingFace:
    """Check a Megatron checkpoint and plan its conversion, without reading weights.

    Args:
        source: a converted checkpoint, or a run's checkpoints/step_NNNNNN.
        base: the folder that config, tokenizer and generation config are taken from; None: `source`.
        dtype: of the result; None keeps the source's.
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
    weights = MegatronSource(root, shape) if needs_weights or is_torch_dist(root) else None
    result_dtype = dtype or (weights.dtype if weights else stated_dtype(beside))
    if result_dtype is None:
        raise ValueError(f"{beside / 'config.json'} states no dtype and there are no weights. Give one with --dtype.")
    sizes = expected_tensors(shape)
    rows = stored_rows(shape)
    tensors = tuple(
        PlannedTensor(name, sizes[name], result_dtype) for stored in rows for name in stored.row.hugging_face
    )
    peak = _peak_bytes(rows, sizes, weights.dtype if weights else result_dtype, result_dtype, shard_bytes)
    plan = Plan(root, goal, tensors, _shards(tensors, shard_bytes), peak)
    return ToHuggingFace(plan, shard_bytes, beside, result_dtype, weights)


def _peak_bytes(
    rows: Sequence[StoredRow],
    sizes: Mapping[str, tuple[int, ...]],
    stored_dtype: torch.dtype,
    dtype: torch.dtype,
    shard_bytes: int,
) -> int:
    """What is held of a file, and beside it a parameter as it is stored and as it is taken apart."""
    held = peak = 0
    for stored in rows:
        numels = [torch.Size(sizes[name]).numel() for name in stored.row.hugging_face]
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
