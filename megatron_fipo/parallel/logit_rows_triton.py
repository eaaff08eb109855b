"""`logit_rows` on CUDA, in two Triton kernels that read the logits once each. Imported only where `triton` is.

Forward, a program takes one token's row block by block. Each of the BLOCK lanes keeps a maximum and sums of its own,
which move to a new maximum as it comes, and the lanes are put together once, after the last block: no program waits
for a reduction between blocks, and each sum is one of V / BLOCK terms before it is one of BLOCK.

Backward, a program takes one block of one token's row, from logits to the gradient in the model's dtype.

Offsets of rows are 64-bit integers: a chunk may have more than 2^31 logits.

Shapes: T tokens of a chunk, V columns: the rows of the vocabulary that this tensor-parallel rank holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SUMS_BLOCK, SUMS_WARPS = 1024, 4
"""Columns that a program of the forward kernel takes at a time, and its warps: each thread has two 16-byte loads under
way, and an H100 has room for all programs of a chunk of some 1,000 tokens at once."""
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
"""Columns of a program of the backward kernel, and its warps."""


@triton.jit
def _sums_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    sums,
    row_stride,
    num_columns,
    num_tokens,
    temperature,
    IS_SCALED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * row_stride
    offsets = tl.arange(0, BLOCK)
    # Finite, so that a lane without a column yet has differences that are numbers.
    maximum = tl.full([BLOCK], -3.0e38, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        is_column = start + offsets < num_columns
        x = tl.load(row + start + offsets, mask=is_column, other=0.0)
        if IS_SCALED:
            x = tl.div_rn(x, temperature)
        x = tl.where(is_column, x, maximum)
        higher = tl.maximum(maximum, x)
        below, difference = maximum - higher, x - higher
        decay = tl.exp(below)
        exponential = tl.where(is_column, tl.exp(difference), 0.0)
        weighted = (weighted + total * below) * decay + exponential * difference
        total = total * decay + exponential
        maximum = higher
    top = tl.max(maximum, axis=0)
    below = maximum - top
    decay = tl.exp(below)
    label = tl.load(labels + token)
    at_label = tl.load(row + label, mask=(label >= 0) & (label < num_columns), other=0.0)
    if IS_SCALED:
        at_label = tl.div_rn(at_label, temperature)
    tl.store(sums + token, top)
    tl.store(sums + num_tokens + token, tl.sum(total * decay, axis=0))
    tl.store(sums + 2 * num_tokens + token, tl.sum((weighted + total * below) * decay, axis=0))
    tl.store(sums + 3 * num_tokens + token, at_label)


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    per_token,
    gradient,
    row_stride,
    gradient_stride,
    per_token_stride,
    num_columns,
    temperature,
    IS_SCALED: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < num_columns
    x = tl.load(logits + token * row_stride + columns, mask=is_column, other=0.0)
    if IS_SCALED:
        x = tl.div_rn(x, temperature)
    maximum = tl.load(per_token + token)
    log_sum = tl.load(per_token + per_token_stride + token)
    entropy = tl.load(per_token + 2 * per_token_stride + token)
    log_prob_gradient = tl.load(per_token + 3 * per_token_stride + token)
    entropy_gradient = tl.load(per_token + 4 * per_token_stride + token)
    log_p = (x - maximum) - log_sum
    result = (-(log_p + entropy) * entropy_gradient - log_prob_gradient) * tl.exp(log_p)
    result += tl.where(columns == tl.load(labels + token), log_prob_gradient, 0.0)
    if IS_SCALED:
        result = tl.div_rn(result, temperature)
    place = gradient + token * gradient_stride + columns
    tl.store(place, result.to(gradient.dtype.element_ty), mask=is_column)


def triton_row_sums(logits: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """`logit_rows.row_sums`, but for the logits, which it leaves as they are; their columns must be adjacent."""
    num_tokens, num_columns = logits.shape
    assert logits.stride(1) == 1 or num_columns == 1
    sums = torch.empty(4, num_tokens, dtype=torch.float32, device=logits.device)
    _sums_kernel[(num_tokens,)](
        logits,
        labels.contiguous(),
        sums,
        logits.stride(0),
        num_columns,
        num_tokens,
        temperature,
        IS_SCALED=temperature != 1.0,
        BLOCK=SUMS_BLOCK,
        num_warps=SUMS_WARPS,
    )
    return sums


def triton_logit_gradient(
    logits: Tensor, labels: Tensor, per_token: Tensor, temperature: float, dtype: torch.dtype
) -> Tensor:
    """`logit_rows.logit_gradient`; in float32 it takes the logits' place, and they are kept otherwise.

    Columns of the logits, and tokens of `per_token`, must be adjacent.
    """
    num_tokens, num_columns = logits.shape
    assert logits.stride(1) == 1 or num_columns == 1
    assert per_token.stride(1) == 1 or num_tokens == 1
    gradient = logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)
    _gradient_kernel[(num_tokens, triton.cdiv(num_columns, GRADIENT_BLOCK))](
        logits,
        labels.contiguous(),
        per_token,
        gradient,
        logits.stride(0),
        gradient.stride(0),
        per_token.stride(0),
        num_columns,
        temperature,
        IS_SCALED=temperature != 1.0,
        BLOCK=GRADIENT_BLOCK,
        num_warps=GRADIENT_WARPS,
    )
    return gradient
