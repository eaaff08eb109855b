"""Future-KL's suffix sum on CUDA, in two Triton kernels. Imported only where `triton` is.

Segments are cut into blocks of BLOCK tokens from their first token on, so only a segment's last block is short.

1. Every block's own discounted sum at its first token ("head").
2. Every block sums up the heads behind it, enters that sum at its last token, and scans its tokens from the end.

The input is read twice and nothing but a head per block is written in between. Sums are float64, with powers tabulated
in float64, as in `future_kl`, whose numbers these are.

Shapes: T tokens, S segments, N blocks of the longest segment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_fipo.rl.future_kl import power_table
from megatron_fipo.rl.segments import Segments

BLOCK = 1024
"""Tokens in a block: the work of one program."""


@triton.jit
def _head_kernel(x, cu_segments, powers, heads, num_blocks, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    segment, block = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(cu_segments + segment), tl.load(cu_segments + segment + 1)
    first = start + block * BLOCK
    if first < end:
        offsets = tl.arange(0, BLOCK)
        values = tl.load(x + first + offsets, mask=first + offsets < end, other=0.0).to(tl.float64)
        head = tl.sum(values * tl.load(powers + offsets), axis=0)
        tl.store(heads + segment * num_blocks + block, head)


@triton.jit
def _compose(decay_behind, sum_behind, decay, value):  # type: ignore[no-untyped-def]
    """The scan's operator: a stretch of tokens is what it multiplies the sum behind it by, and what it adds."""
    return decay_behind * decay, value + decay * sum_behind


@triton.jit
def _scan_kernel(  # type: ignore[no-untyped-def]
    x,
    cu_segments,
    powers,
    block_powers,
    heads,
    result,
    num_blocks,
    BLOCK: tl.constexpr,  # noqa: N803
    NUM_HEADS: tl.constexpr,  # noqa: N803
):
    segment, block = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(cu_segments + segment), tl.load(cu_segments + segment + 1)
    first = start + block * BLOCK
    if first < end:
        # Heads behind this block, at distances of whole blocks from its end.
        places = tl.arange(0, NUM_HEADS)
        is_behind = (places > block) & (start + places * BLOCK < end)
        behind = tl.load(heads + segment * num_blocks + places, mask=is_behind, other=0.0)
        weights = tl.load(block_powers + places - block - 1, mask=is_behind, other=0.0)
        carry = tl.sum(behind * weights, axis=0)

        offsets = tl.arange(0, BLOCK)
        is_token = first + offsets < end
        values = tl.load(x + first + offsets, mask=is_token, other=0.0).to(tl.float64)
        gamma = tl.load(powers + 1)
        values += tl.where(offsets == BLOCK - 1, gamma * carry, 0.0)
        decays = tl.zeros([BLOCK], tl.float64) + gamma
        _, sums = tl.associative_scan((decays, values), 0, _compose, reverse=True)
        tl.store(result + first + offsets, sums.to(tl.float32), mask=is_token)


def triton_suffix_sum(x: Tensor, segments: Segments, half_life_tokens: float) -> Tensor:
    """`future_kl.segment_suffix_sum` on x's device, not differentiable; arguments are checked there.

    Nothing is read from the device nor sent to it: lengths are the host's, and tables of powers are kept.

    Args:
        x: float32 [T], contiguous.
        segments: the segments of these tokens, on the same device.

    Returns:
        float32 [T].
    """
    num_blocks = triton.cdiv(segments.longest, BLOCK)
    result = torch.empty_like(x)
    if not num_blocks:
        return result
    rate, num_heads = 1.0 / half_life_tokens, triton.next_power_of_2(num_blocks)
    powers = power_table(rate, BLOCK, x.device)
    block_powers = power_table(rate * BLOCK, num_heads, x.device)
    num_segments = len(segments.cu) - 1
    heads = torch.empty(num_segments, num_blocks, dtype=torch.float64, device=x.device)
    grid = (num_segments, num_blocks)
    _head_kernel[grid](x, segments.cu_on_device, powers, heads, num_blocks, BLOCK=BLOCK)
    _scan_kernel[grid](
        x,
        segments.cu_on_device,
        powers,
        block_powers,
        heads,
        result,
        num_blocks,
        BLOCK=BLOCK,
        NUM_HEADS=num_heads,
    )
    return result
