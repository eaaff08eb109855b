"""Weights on their way to servers: packed into buckets, and kept on disk for servers that have to start anew."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megatron_fipo.rollout.server_api import Bucket, TensorSpec

_NOT_CONFIGURATION = {".safetensors", ".bin", ".pt", ".gguf"}


def pack(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, dtype: torch.dtype, device: torch.device | None
) -> Iterator[Bucket]:
    """Copy tensors one behind the other into buckets, in their order.

    Two buffers take turns, so that one bucket can be sent while the next is filled: a bucket is overwritten when the
    one after the next is asked for.

    Args:
        tensors: whole tensors under their Hugging Face names.
        bucket_bytes: size of a bucket. A tensor that is larger gets one of its own.
        dtype: dtype of the buckets' tensors.
        device: where buckets lie; None takes the tensors' own.

    Raises:
        ValueError: if a name comes twice.
    """
    buffers: list[Tensor | None] = [None, None]
    turn, used = 0, 0
    specs: list[TensorSpec] = []
    names: set[str] = set()
    for name, tensor in tensors:
        if name in names:
            raise ValueError(f"{name} came twice in the stream of weights")
        names.add(name)
        num_bytes = tensor.numel() * dtype.itemsize
        place = tensor.device if device is None else device
        if specs and used + num_bytes > bucket_bytes:
            yield _bucket(buffers[turn], specs, used)
            turn, used, specs = 1 - turn, 0, []
        buffer = buffers[turn]
        size = max(bucket_bytes, num_bytes)
        if buffer is None or (not specs and len(buffer) != size):
            buffer = buffers[turn] = torch.empty(size, dtype=torch.uint8, device=place)
        flat = buffer[used : used + num_bytes].view(dtype)
        flat.copy_(tensor.detach().reshape(-1))
        specs.append(TensorSpec(name, dtype, tuple(tensor.shape), used, used + num_bytes))
        used += num_bytes
    if specs:
        yield _bucket(buffers[turn], specs, used)


def _bucket(buffer: Tensor | None, specs: list[TensorSpec], used: int) -> Bucket:
    assert buffer is not None, "there are tensors in it"
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()  # others read it, on streams of their own
    return Bucket(buffer[:used], tuple(specs))


class SnapshotWriter:
    """The newest weights as a Hugging Face folder, one file for each bucket.

    Args:
        folder: where snapshots lie, each in a folder of its own.
        base_folder: model folder whose configuration and tokenizer go along.
    """

    def __init__(self, folder: Path, base_folder: str | Path) -> None:
        self._folder, self._base = folder, Path(base_folder)
        self._partial = folder / "partial"
        self._files: dict[str, str] = {}
        self._num_bytes = 0

    def begin(self) -> None:
        """Begin anew; what an unfinished one has written goes."""
        shutil.rmtree(self._partial, ignore_errors=True)
        self._partial.mkdir(parents=True)
        self._files, self._num_bytes = {}, 0
        for file in self._base.iterdir():
            if file.is_file() and file.suffix not in _NOT_CONFIGURATION and not file.name.endswith(".index.json"):
                shutil.copy2(file, self._partial / file.name)

    def add(self, bucket: Bucket) -> None:
        """Write a bucket."""
        file = f"model-{len(set(self._files.values())) + 1:05d}.safetensors"
        tensors = {name: tensor.cpu().clone() for name, tensor in bucket.tensors()}
        save_file(tensors, self._partial / file, metadata={"format": "pt"})
        self._files.update(dict.fromkeys(tensors, file))
        self._num_bytes += len(bucket.flat)

    def commit(self, version: str) -> Path:
        """Finish it; the folder appears whole or not at all, and is the only one then."""
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._files}
        (self._partial / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        target = self._folder / f"version-{version}"
        if target.exists():  # the same version once more, after a failure
            shutil.rmtree(target)
        self._partial.rename(target)
        return target

    def keep_only(self, snapshot: Path) -> None:
        """Delete every other one."""
        for folder in self._folder.iterdir():
            if folder != snapshot:
                shutil.rmtree(folder)
