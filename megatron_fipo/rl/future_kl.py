"""Future-KL: the suffix sum F_t = x_t + gamma * F_{t+1} within each packed sequence, gamma = 2^(-1/half_life).

Shapes: T packed tokens, S segments (sequences, or the chunks into which context parallelism cuts them), N blocks.

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

import importlib.util
import itertools
import math

import torch
from torch import Tensor

BLOCK = 32
"""Tokens in a block. The in-block product costs T * BLOCK multiplications; 32 was fastest of 16 … 256 on CPU."""


def future_kl(x: Tensor, cu_seqlens: Tensor, half_life_tokens: float) -> Tensor:
    """F_t = sum over k >= t of gamma^(k - t) * x_k within each sequence, the current token included.

    Exact: |error_t| <= 2e-6 * sum over k >= t of gamma^(k - t) * |x_k|. Differentiable, though FIPO detaches it.
    Waits for the device once if `cu_seqlens` lies on one; keep it on the CPU to avoid that.

    Args:
        x: [T] float32, the log-prob shift where a token takes part and 0 elsewhere. A non-finite entry makes
            entries of its own sequence non-finite, never of another.
        cu_seqlens: [S + 1] integers, 0 = first <= … <= last = T. Empty sequences are allowed.
        half_life_tokens: distance in tokens at which influence has halved, > 0.

    Returns:
        [T] float32.

    Raises:
        ValueError: if x is not a float32 vector, cu_seqlens does not partition it, or the half-life is not positive.
    """
    return segment_suffix_sum(x, cu_seqlens, half_life_tokens)


def segment_suffix_sum(x: Tensor, cu_segments: Tensor, half_life_tokens: float) -> Tensor:
    """`future_kl` over segments that need not be whole sequences.

    Context parallelism sums each of its chunks so, exchanges `segment_heads`, and adds what lies behind a chunk by
    `decay_to_end`. Arguments, result and errors are those of `future_kl`.
    """
    _check_half_life(half_life_tokens)
    if x.dtype != torch.float32 or x.dim() != 1:
        raise ValueError(
            f"x must be a float32 vector, one entry per token; it is {x.dtype} with shape {tuple(x.shape)}. "
            "Take log-prob shifts in float32: lower precision changes gamma itself."
        )
    cu = _checked_cu_segments(cu_segments, x.shape[0])
    if not x.shape[0]:
        return x.clone()
    if x.is_cuda and not x.requires_grad and importlib.util.find_spec("triton") is not None:
        from megatron_fipo.rl.future_kl_triton import triton_suffix_sum

        return triton_suffix_sum(x.contiguous(), cu, half_life_tokens)
    return _blocked_suffix_sum(x.double(), cu, half_life_tokens).float()


def future_kl_reference(x: Tensor, cu_seqlens: Tensor, half_life_tokens: float) -> Tensor:
    """The recurrence itself, token by token from each sequence's end: float64 [T], for any dtype of x."""
    _check_half_life(half_life_tokens)
    gamma = 2.0 ** (-1.0 / half_life_tokens)
    boundaries = _checked_cu_segments(cu_seqlens, x.shape[0]).tolist()
    values = x.double().tolist()
    result = [0.0] * len(values)
    for start, end in itertools.pairwise(boundaries):
        behind = 0.0
        for t in range(end - 1, start - 1, -1):
            behind = values[t] + gamma * behind
            result[t] = behind
    return torch.tensor(result, dtype=torch.float64, device=x.device)


def segment_heads(values: Tensor, cu_segments: Tensor) -> Tensor:
    """[S] entry of `values` [T] at each segment's first token, 0 for an empty segment."""
    cu = _checked_cu_segments(cu_segments, values.shape[0])
    if not values.shape[0]:
        return values.new_zeros(len(cu) - 1)
    starts, lengths = cu[:-1].to(values.device), cu.diff().to(values.device)
    return torch.where(lengths > 0, values[starts.clamp(max=values.shape[0] - 1)], 0.0)


def decay_to_end(cu_segments: Tensor, half_life_tokens: float) -> Tensor:
    """float32 [T]: gamma^(end - t) for each token t, end being one past the last token of its segment.

    What the sum behind a segment's end is multiplied by where it enters F_t. Lies on the device of `cu_segments`.
    """
    _check_half_life(half_life_tokens)
    num_tokens = int(cu_segments[-1]) if cu_segments.numel() else 0
    cu = _checked_cu_segments(cu_segments, num_tokens)
    lengths = cu.diff()
    longest = int(lengths.max()) if len(lengths) else 0
    powers = _powers(longest + 1, 1.0 / half_life_tokens, cu_segments.device).float()
    ends = torch.repeat_interleave(
        cu[1:].to(cu_segments.device), lengths.to(cu_segments.device), output_size=num_tokens
    )
    return powers[ends - torch.arange(num_tokens, device=cu_segments.device)]


def _blocked_suffix_sum(x: Tensor, cu: Tensor, half_life: float) -> Tensor:
    """The suffix sum of x [T] float64 over segments `cu` [S + 1] (int64, CPU). Uses x as scratch space."""
    lengths = cu.diff()
    num_blocks = (lengths + BLOCK - 1) // BLOCK
    cu_blocks = torch.zeros(len(cu), dtype=torch.int64)
    torch.cumsum(num_blocks, 0, out=cu_blocks[1:])
    total_blocks = int(cu_blocks[-1])

    rows, places = _to_blocks(x, cu, cu_blocks * BLOCK)
    powers = _powers(BLOCK, 1.0 / half_life, x.device)
    if int(num_blocks.max()) > 1:
        block_sums = _blocked_suffix_sum(rows @ powers, cu_blocks, half_life / BLOCK)
        behind = torch.zeros_like(block_sums)
        behind[:-1] = block_sums[1:]
        last_blocks = cu_blocks[1:][num_blocks > 0] - 1
        behind[last_blocks.to(x.device)] = 0.0
        rows[:, -1] += 2.0 ** (-1.0 / half_life) * behind
    steps = torch.arange(BLOCK, device=x.device)
    distance = steps[:, None] - steps[None, :]
    sums = rows @ torch.where(distance >= 0, powers[distance.clamp(min=0)], 0.0)
    flat = sums.reshape(total_blocks * BLOCK)
    return flat if places is None else flat[places]


def _to_blocks(x: Tensor, cu: Tensor, cu_padded: Tensor) -> tuple[Tensor, Tensor | None]:
    """Lay the segments out from `cu_padded` on: rows [N, BLOCK], and each token's place, None where nothing moved."""
    if torch.equal(cu, cu_padded):
        return x.reshape(-1, BLOCK), None
    offsets = (cu_padded - cu)[:-1].to(x.device)
    num_tokens = x.shape[0]
    places = torch.repeat_interleave(offsets, cu.diff().to(x.device), output_size=num_tokens)
    places += torch.arange(num_tokens, device=x.device)
    padded = x.new_zeros(int(cu_padded[-1])).index_copy(0, places, x)
    return padded.reshape(-1, BLOCK), places


def _powers(count: int, rate: float, device: torch.device) -> Tensor:
    """float64 [count]: 2^(-k * rate) for k = 0 … count - 1."""
    return torch.exp2(-rate * torch.arange(count, dtype=torch.float64, device=device))


def _check_half_life(half_life_tokens: float) -> None:
    if not (math.isfinite(half_life_tokens) and half_life_tokens > 0):
        raise ValueError(
            f"half_life_tokens={half_life_tokens} must be a positive, finite number of tokens; the paper uses 32."
        )


def _checked_cu_segments(cu_segments: Tensor, num_tokens: int) -> Tensor:
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
