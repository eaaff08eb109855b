"""A checksum of tensors that can be computed piece by piece, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22
"""Elements at a time: the temporary int64 tensors take 8 bytes for each."""

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integer of the same size, by element size in bytes."""


def digest(tensor: Tensor, start: int = 0) -> int:
    """`digest_sum` as 0 … 2**64 - 1; waits for the tensor's device."""
    return int(digest_sum(tensor, start)) % 2**64


@torch.no_grad()
def digest_sum(tensor: Tensor, start: int = 0) -> Tensor:
    """Sum over elements of (bit pattern × odd factor that the position alone decides), modulo 2**64.

    A factor is odd, so changing one element always changes the sum; other changes, such as exchanging elements, leave
    it alone with a probability of about 2**-63. The sum over a tensor is the sum over its pieces: pieces that are not
    there together, and zeros of a padding, need no copy. It is a checksum against mistakes, not against an adversary.

    Args:
        tensor: any shape and dtype; elements count in row-major order.
        start: position of its first element in the whole that it is a piece of.

    Returns:
        0-d int64 on the tensor's device, modulo 2**64 in its 64 bits.
    """
    flat = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for offset in range(0, flat.numel(), _CHUNK_ELEMENTS):
        bits = flat[offset : offset + _CHUNK_ELEMENTS].long()
        first = start + offset
        total += (bits * _factors(first, first + bits.numel(), flat.device)).sum()
    return total


def label(value: int, dtype: torch.dtype) -> str:
    """Text of a digest. The dtype is part of it: equal bits of another dtype are another weight."""
    return f"{str(dtype).removeprefix('torch.')}:{value:016x}"


def _factors(first: int, stop: int, device: torch.device) -> Tensor:
    """Odd int64 factors of positions first … stop - 1. Multiplication wraps around, on CPU and CUDA alike."""
    mixed = torch.arange(first + 1, stop + 1, dtype=torch.int64, device=device)
    mixed *= -7046029254386353131  # 0x9E3779B97F4A7C15, the golden ratio; then as in splitmix64
    mixed ^= mixed >> 30
    mixed *= -4658895280553007687  # 0xBF58476D1CE4E5B9
    mixed ^= mixed >> 27
    return mixed.bitwise_or_(1)
