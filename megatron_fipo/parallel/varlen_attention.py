"""Causal attention over packed sequences in one call of torch's flash kernel, for half precision on GPUs.

The kernel takes any number of pairs (queries, keys), concatenated, and aligns its causal mask to their last query and
last key. Under context parallelism a rank holds two chunks of each sequence, and has gathered all keys: each chunk is a
pair with the keys up to its own end.

Shapes: T packed tokens, T_local = T / cp, S sequences, h query heads, g key-value heads, d channels a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fipo.parallel import cp_layout
from megatron_fipo.rl.segments import to_device

try:
    from torch.nn.attention import varlen
except ImportError:  # before torch 2.10
    _varlen_attn: Callable[..., Any] | None = None
else:
    _varlen_attn = varlen.varlen_attn

Kernel = Literal["varlen", "flash", "masked"]
_CAUSAL = (-1, 0)
"""Value of `window`: all keys to the left, none to the right."""
_LARGEST_HEAD = 256


def kernel_for(is_cuda: bool, dtype: torch.dtype, head_dim: int) -> Kernel:
    """How to attend: varlen (this module), flash (blocks without a mask) or masked (scaled_dot_product_attention).

    Flash kernels compute in half precision only; numbers on a CPU, and in float32, are those of the masked one.
    """
    if not is_cuda or dtype not in (torch.bfloat16, torch.float16):
        return "masked"
    return "varlen" if head_dim % 8 == 0 and head_dim <= _LARGEST_HEAD and _has_window(_varlen_attn) else "flash"


def kernel_in_words(is_cuda: bool, dtype: torch.dtype, head_dim: int) -> str:
    """Describe the choice in words for a log."""
    return {
        "varlen": "torch's flash kernel (varlen_attn)",
        "flash": "torch's scaled_dot_product_attention by flash, in blocks",
        "masked": "torch's scaled_dot_product_attention",
    }[kernel_for(is_cuda, dtype, head_dim)]


def _has_window(function: Callable[..., Any] | None) -> bool:
    """Whether this torch's varlen_attn takes a window and a scale: the first ones knew is_causal only."""
    return function is not None and {"window_size", "scale"} <= inspect.signature(function).parameters.keys()


@dataclass(frozen=True)
class VarlenLayout:
    """The pairs (queries, keys) of one rank; the same for every layer of a microbatch.

    Attributes:
        cu_queries, cu_keys: int32 [pairs + 1], cumulative; queries are local rows as they lie.
        longest: upper bounds of a pair's queries and keys.
        key_rows: int64 [keys] rows of the gathered keys; None where keys are the local rows as they lie.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    longest: tuple[int, int]
    key_rows: Tensor | None


def build_varlen_layout(
    cu_seqlens_padded: Tensor, longest: int, cp_size: int, cp_rank: int, device: torch.device
) -> VarlenLayout:
    """Pairs of packed sequences. Alone in its context, a rank's are the sequences themselves.

    Args:
        cu_seqlens_padded: int [S + 1], global cumulative padded lengths, each divisible by 2*cp. Nothing waits for a
            device where they are on the CPU, or cp is 1.
        longest: at least the largest of the lengths.
        device: where the layout is to lie.

    Raises:
        ValueError: if a length does not divide into the chunks.
    """
    if cp_size == 1:
        cu_seqlens = to_device(cu_seqlens_padded.int(), device)
        return VarlenLayout(cu_seqlens, cu_seqlens, (longest, longest), None)
    cp_layout.check_padded(cu_seqlens_padded, cp_size)
    num_chunks = cp_layout.num_chunks_of(cp_size)
    gathered_row = torch.argsort(cp_layout.gathered_positions(cu_seqlens_padded, cp_size))
    # Each sequence's chunk cp_rank, then its chunk num_chunks - 1 - cp_rank, each with the keys up to its own end.
    seen = torch.tensor([cp_rank + 1, num_chunks - cp_rank], device=gathered_row.device)
    chunk = cu_seqlens_padded.diff().long() // num_chunks
    lengths = (chunk[:, None] * seen).flatten()
    cu_keys = F.pad(lengths.cumsum(0), (1, 0))
    num_keys = len(gathered_row) // num_chunks * (num_chunks + 1)  # the two chunks see one chunk more than there are
    pair = torch.repeat_interleave(torch.arange(len(lengths), device=seen.device), lengths, output_size=num_keys)
    first = cu_seqlens_padded[:-1].long().repeat_interleave(2)
    key_rows = gathered_row[first[pair] + torch.arange(num_keys, device=seen.device) - cu_keys[pair]]
    cu_queries = cp_layout.local_cu_segments(cu_seqlens_padded, cp_size)
    cu_queries, cu_keys, key_rows = (to_device(each, device) for each in (cu_queries.int(), cu_keys.int(), key_rows))
    return VarlenLayout(cu_queries, cu_keys, (-(-longest // num_chunks), longest), key_rows)


def attend_varlen(query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float) -> Tensor:
    """Attention of this rank's rows.

    Args:
        query: [T_local, h, d]. key, value: [T, g, d], in the order in which ranks' rows are gathered.

    Returns:
        [T_local, h, d].
    """
    assert _varlen_attn is not None, "kernel_for has asked for it"
    if layout.key_rows is not None:
        key, value = key[layout.key_rows], value[layout.key_rows]
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(_varlen_attn).parameters:
            options["enable_gqa"] = True
        else:  # torch 2.11 does not say that its kernel shares keys and values among query heads
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    longest_queries, longest_keys = layout.longest
    attended = _varlen_attn(
        query,
        key,
        value,
        layout.cu_queries,
        layout.cu_keys,
        longest_queries,
        longest_keys,
        window_size=_CAUSAL,
        scale=scale,
        **options,
    )
    assert isinstance(attended, Tensor), "no auxiliary output was asked for"
    return attended
