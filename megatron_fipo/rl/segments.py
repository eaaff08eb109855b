"""Segments of packed tokens, and the tables by which sums over them find their tokens on a device.

A length that is read from a GPU waits for everything that was queued there, and a table that is sent to one in every
call costs a copy each time. So lengths stay on the CPU, what a device needs of them is made there once for a
microbatch, and the sums of `future_kl` take both from here.

Shapes: T packed tokens, N segments: whole sequences, or the two chunks that context parallelism leaves of each.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

BLOCK = 32
"""Tokens in a block. The in-block product costs T * BLOCK multiplications; 32 was fastest of 16 … 256 on CPU."""


@dataclass(frozen=True)
class BlockLevel:
    """One level of the blocked suffix sum: segments laid out in whole blocks, zeros behind each one's end."""

    num_blocks: int
    """Blocks of all segments."""
    places: Tensor | None
    """int64 [T], where each token lies in the blocks; None where all lie there already."""
    last_blocks: Tensor | None
    """int64, the last block of each segment that is not empty; None where no segment has more than one block."""


@dataclass(frozen=True)
class Segments:
    """Consecutive stretches of packed tokens."""

    cu: Tensor
    """int64 [N + 1] on the CPU, cumulative lengths: 0 = first <= … <= last = T."""
    cu_on_device: Tensor
    """`cu` on the device of the tokens."""
    num_tokens: int
    """T."""
    longest: int
    """Tokens of the longest segment."""
    levels: tuple[BlockLevel, ...] | None
    """Tables of the blocked suffix sum, on the device; None where Triton's kernels do without."""

    @property
    def lengths_on_device(self) -> Tensor:
        """int64 [N]."""
        return self.cu_on_device.diff()

    def per_token(self, values: Tensor) -> Tensor:
        """Each segment's value [N] at each of its tokens [T]. Being told T, the device is not asked for it."""
        return torch.repeat_interleave(values, self.lengths_on_device, output_size=self.num_tokens)


def segments_of(cu_segments: Tensor, num_tokens: int, device: torch.device) -> Segments:
    """Segments of `num_tokens` tokens on `device`. Waits for a device if `cu_segments` lies on one.

    Raises:
        ValueError: if cu_segments does not partition [0, num_tokens).
    """
    cu = checked_cu_segments(cu_segments, num_tokens)
    return Segments(
        cu=cu,
        cu_on_device=to_device(cu, device),
        num_tokens=num_tokens,
        longest=int(cu.diff().max()) if len(cu) > 1 else 0,
        levels=None if sums_by_triton(device) else block_levels(cu, device),
    )


def sums_by_triton(device: torch.device) -> bool:
    """Whether suffix sums on this device are Triton's where no gradient is asked for."""
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def block_levels(cu: Tensor, device: torch.device) -> tuple[BlockLevel, ...]:
    """The tables of the blocked suffix sum over segments `cu` (int64, CPU); none where there is no token.

    Each level's blocks are the tokens of the next, until no segment has more than one block.
    """
    levels: list[BlockLevel] = []
    while int(cu[-1]):
        lengths = cu.diff()
        num_blocks = (lengths + BLOCK - 1) // BLOCK
        cu_blocks = torch.zeros_like(cu)
        torch.cumsum(num_blocks, 0, out=cu_blocks[1:])
        places = None
        if not torch.equal(cu, cu_blocks * BLOCK):
            offsets = (cu_blocks * BLOCK - cu)[:-1]
            places = torch.repeat_interleave(offsets, lengths) + torch.arange(int(cu[-1]))
        is_last_level = int(num_blocks.max()) == 1
        last_blocks = None if is_last_level else cu_blocks[1:][num_blocks > 0] - 1
        levels.append(
            BlockLevel(
                num_blocks=int(cu_blocks[-1]),
                places=None if places is None else to_device(places, device),
                last_blocks=None if last_blocks is None else to_device(last_blocks, device),
            )
        )
        if is_last_level:
            break
        cu = cu_blocks
    return tuple(levels)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A table of the CPU's on `device`, without waiting for what the device is at: what is sent is never changed."""
    return table.to(device, non_blocking=True)


def checked_cu_segments(cu_segments: Tensor, num_tokens: int) -> Tensor:
    """`cu_segments` as int64 on the CPU, after checking that it partitions [0, num_tokens)."""
    if cu_segments.dim() != 1 or not cu_segments.numel() or cu_segments.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be a vector of integers, 0 first; it is {cu_segments.dtype}, {tuple(cu_segments.shape)}."
        )
    cu = cu_segments.detach().to(device="cpu", dtype=torch.int64)
    if int(cu[0]) != 0 or int(cu[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens runs from {int(cu[0])} to {int(cu[-1])} but must run from 0 to the number of tokens, "
            f"{num_tokens}. Pass the cumulative lengths of the layout in which the tokens lie, padding included."
        )
    steps = cu.diff()
    if bool((steps < 0).any()):
        place = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens must not descend; entry {place + 1} is {int(cu[place + 1])} after {int(cu[place])}."
        )
    return cu
