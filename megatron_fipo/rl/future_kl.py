"""Future-KL: the suffix sum F_t = x_t + gamma * F_{t+1} within each packed sequence, gamma = 2^(-1/half_life).

Shapes: T packed tokens, S sequences, N segments (sequences, or the chunks into which context parallelism cuts them).

`future_kl_reference` is the recurrence as one would write it on paper. `future_kl` gives the same numbers in O(T) work,
without a Python loop over tokens or sequences:

1. Every segment is laid out in whole blocks of BLOCK tokens, zeros behind its end.
2. A block's own sum at its first token ("head") is one product with the powers of gamma.
3. The heads are again a suffix sum, shorter by BLOCK and with gamma^BLOCK: the same function once more, until each
   segment is one block. That gives the whole sum at each block's first token.
4. gamma times the next block's sum joins the block's last token, and one product with the triangular matrix of the
   powers gamma^(k - j) gives every token its sum.

On CUDA, where Triton is installed and no gradient is asked for, `future_kl_triton` computes the same in two kernels.

No step divides by a power of gamma, so nothing overflows however long the sequence. Powers and sums are float64 and
only the result is rounded to float32: the error stays at float32's own rounding, and no TF32 setting can reach it.

Source: FIPO, arXiv 2603.19835, where the same sum is written out over all pairs of tokens, in O(L^2) work.
"""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import torch
from torch import Tensor

from megatron_fipo.rl.segments import (
    BLOCK,
    BlockLevel,
    Segments,
    block_levels,
    checked_cu_segments,
    segments_of,
    sums_by_triton,
)


def future_kl(x: Tensor, cu_seqlens: Tensor | Segments, half_life_tokens: float) -> Tensor:
    """F_t = sum over k >= t of gamma^(k - t) * x_k within each sequence, the current token included.

    Exact: |error_t| <= 2e-6 * sum over k >= t of gamma^(k - t) * |x_k|. Differentiable, though FIPO detaches it.
    Waits for the device if `cu_seqlens` lies on one; keep it on the CPU to avoid that.

    Args:
        x: [T] float32, the log-prob shift where a token takes part and 0 elsewhere. A non-finite entry makes
            entries of its own sequence non-finite, never of another.
        cu_seqlens: [S + 1] integers, 0 = first <= … <= last = T. Empty sequences are allowed. Where the same sequences
            are summed again and again, make their `Segments` once and pass those.
        half_life_tokens: distance in tokens at which influence has halved, > 0.

    Returns:
        [T] float32.

    Raises:
        ValueError: if x is not a float32 vector, cu_seqlens does not partition it, or the half-life is not positive.
    """
    return segment_suffix_sum(x, cu_seqlens, half_life_tokens)


def segment_suffix_sum(x: Tensor, cu_segments: Tensor | Segments, half_life_tokens: float) -> Tensor:
    """`future_kl` over segments that need not be whole sequences.

    Context parallelism sums each of its chunks so, exchanges `segment_heads`, and adds what lies behind a chunk by
    `decay_to_end`. Arguments, result and errors are those of `future_kl`; with `Segments` made before, nothing is read
    from a device nor sent to one.
    """
    _check_half_life(half_life_tokens)
    if x.dtype != torch.float32 or x.dim() != 1:
        raise ValueError(
            f"x must be a float32 vector, one entry per token; it is {x.dtype} with shape {tuple(x.shape)}. "
            "Take log-prob shifts in float32: lower precision changes gamma itself."
        )
    segments = _segments(cu_segments, x.shape[0], x.device)
    if not x.shape[0]:
        return x.clone()
    if sums_by_triton(x.device) and not x.requires_grad:
        from megatron_fipo.rl.future_kl_triton import triton_suffix_sum

        return triton_suffix_sum(x.contiguous(), segments, half_life_tokens)
    levels = block_levels(segments.cu, x.device) if segments.levels is None else segments.levels
    return _blocked_suffix_sum(x.double(), levels, half_life_tokens).float()


def future_kl_reference(x: Tensor, cu_seqlens: Tensor, half_life_tokens: float) -> Tensor:
    """The recurrence itself, token by token from each sequence's end: float64 [T], for any dtype of x."""
    _check_half_life(half_life_tokens)
    gamma = 2.0 ** (-1.0 / half_life_tokens)
    boundaries = checked_cu_segments(cu_seqlens, x.shape[0]).tolist()
    values = x.double().tolist()
    result = [0.0] * len(values)
    for start, end in itertools.pairwise(boundaries):
        behind = 0.0
        for t in range(end - 1, start - 1, -1):
            behind = values[t] + gamma * behind
            result[t] = behind
    return torch.tensor(result, dtype=torch.float64, device=x.device)


def segment_heads(values: Tensor, cu_segments: Tensor | Segments) -> Tensor:
    """[N] entry of `values` [T] at each segment's first token, 0 for an empty segment."""
    segments = _segments(cu_segments, values.shape[0], values.device)
    if not values.shape[0]:
        return values.new_zeros(len(segments.cu) - 1)
    starts = segments.cu_on_device[:-1].clamp(max=values.shape[0] - 1)
    return torch.where(segments.lengths_on_device > 0, values[starts], 0.0)


def decay_to_end(cu_segments: Tensor | Segments, half_life_tokens: float) -> Tensor:
    """float32 [T]: gamma^(end - t) for each token t, end being one past the last token of its segment.

    What the sum behind a segment's end is multiplied by where it enters F_t. Lies on the device of `cu_segments`.
    """
    _check_half_life(half_life_tokens)
    if isinstance(cu_segments, Tensor):
        num_tokens = int(cu_segments[-1]) if cu_segments.numel() else 0
        cu_segments = segments_of(cu_segments, num_tokens, cu_segments.device)
    device = cu_segments.cu_on_device.device
    powers = power_table(1.0 / half_life_tokens, cu_segments.longest + 1, device, torch.float32)
    ends = cu_segments.per_token(cu_segments.cu_on_device[1:])
    return powers[ends - torch.arange(cu_segments.num_tokens, device=device)]


def power_table(rate: float, count: int, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """[count]: 2^(-k * rate) for k = 0 … count - 1, computed in float64. Kept, so it must not be changed."""
    # Lengths differ from microbatch to microbatch; rounded up, they ask for the same few tables again and again.
    return _power_table(rate, 1 << max(count - 1, 0).bit_length(), device, dtype)[:count]


@lru_cache(maxsize=256)
def _power_table(rate: float, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # or a table first made in inference mode could take no part in a gradient
        return torch.exp2(-rate * torch.arange(count, dtype=torch.float64, device=device)).to(dtype)


@lru_cache(maxsize=256)
def _block_matrix(rate: float, device: torch.device) -> Tensor:
    """float64 [BLOCK, BLOCK]: 2^(-(k - j) * rate) at [k, j], 0 where k < j. Kept, so it must not be changed."""
    with torch.inference_mode(False):
        steps = torch.arange(BLOCK, device=device)
        distance = steps[:, None] - steps[None, :]
        return torch.where(distance >= 0, power_table(rate, BLOCK, device)[distance.clamp(min=0)], 0.0)


def _blocked_suffix_sum(x: Tensor, levels: tuple[BlockLevel, ...], half_life: float) -> Tensor:
    """The suffix sum of x [T] float64 over the segments that `levels` were made of, the first being x's own level."""
    level, rate = levels[0], 1.0 / half_life
    if level.places is None:
        rows = x.reshape(-1, BLOCK)
    else:
        rows = x.new_zeros(level.num_blocks * BLOCK).index_copy(0, level.places, x).reshape(-1, BLOCK)
    if level.last_blocks is not None:
        heads = rows @ power_table(rate, BLOCK, x.device)
        block_sums = _blocked_suffix_sum(heads, levels[1:], half_life / BLOCK)
        behind = torch.zeros_like(block_sums)
        behind[:-1] = block_sums[1:]
        behind.index_fill_(0, level.last_blocks, 0.0)
        rows[:, -1] += 2.0**-rate * behind
    flat = (rows @ _block_matrix(rate, x.device)).reshape(level.num_blocks * BLOCK)
    return flat if level.places is None else flat[level.places]


def _segments(cu_segments: Tensor | Segments, num_tokens: int, device: torch.device) -> Segments:
    """The segments of `num_tokens` tokens on `device`, made here unless they are given."""
    if isinstance(cu_segments, Tensor):
        return segments_of(cu_segments, num_tokens, device)
    if cu_segments.num_tokens != num_tokens:
        raise ValueError(
            f"the segments were made for {cu_segments.num_tokens} tokens but there are {num_tokens}. Make them of the "
            "layout in which the tokens lie."
        )
    return cu_segments


def _check_half_life(half_life_tokens: float) -> None:
    if not (math.isfinite(half_life_tokens) and half_life_tokens > 0):
        raise ValueError(
            f"half_life_tokens={half_life_tokens} must be a positive, finite number of tokens; the paper uses 32."
        )
