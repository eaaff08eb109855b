"""Weights on their way to servers, packed into buckets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_fipo.parallel.device_memory import shareable_allocations
from megatron_fipo.rollout.servers.cuda_handles import CudaHandle


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies in a bucket. Spans of bytes are half open."""

    name: str
    """Hugging Face name."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Byte offset in the bucket, a multiple of the dtype's size."""
    stop: int


@dataclass(frozen=True)
class Bucket:
    """Several tensors in one buffer, each directly after the one before."""

    flat: Tensor
    """uint8 [bytes], contiguous, on the CPU or on this rank's CUDA device."""
    specs: tuple[TensorSpec, ...]
    handles: Mapping[str, CudaHandle] = field(default_factory=dict)
    """Where the same bytes lie on the GPUs that servers use, by the GPU's name; empty where nobody opens them there."""

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """(name, view into the buffer) in order."""
        for spec in self.specs:
            yield spec.name, self.flat[spec.start : spec.stop].view(spec.dtype).view(spec.shape)

    def handles_on(self, gpus: Sequence[str], tp: int) -> list[CudaHandle | None]:
        """The handle for each tensor-parallel rank of a server, on that rank's own GPU; None where it gets the values.

        Args:
            gpus: the server's GPUs, in the order of its ranks.
            tp: the server's number of ranks.
        """
        if not self.handles:
            assert not self.flat.is_cuda, "a server is handed memory of its own GPU"
            return [None] * tp
        assert len(gpus) == tp, "set-up looked for a rank of the trainer on each of the server's GPUs"
        return [self.handles[gpu] for gpu in gpus]


def pack(
    tensors: Iterable[tuple[str, Tensor]], bucket_bytes: int, dtype: torch.dtype, device: torch.device | None
) -> Iterator[Bucket]:
    """Copy tensors into buckets, in their order, each directly after the one before.

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
            buffer = buffers[turn] = None  # what it held goes before the larger one comes
            with shareable_allocations():
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
