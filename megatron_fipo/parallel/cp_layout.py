"""Where Megatron puts the tokens of packed sequences under context parallelism. Index arithmetic, no communication.

Each sequence, padded to a multiple of 2*cp, is cut into C = 2*cp chunks of equal length; rank r holds chunk r and chunk
C-1-r, the sequence's front and back part, one after the other ("zigzag"), sequence after sequence. Under a causal mask
every rank then has the same work.

Shapes: T packed tokens, T_local = T / cp, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_padded(cu_seqlens_padded: Tensor, cp_size: int) -> None:
    """Raise ValueError unless every padded length divides into the layout's chunks."""
    lengths = cu_seqlens_padded.diff()
    num_chunks = num_chunks_of(cp_size)
    uneven = (lengths % num_chunks).nonzero().flatten().tolist()
    if uneven:
        raise ValueError(
            f"parallel.cp={cp_size} needs padded lengths divisible by {num_chunks}; sequence {uneven[0]} has "
            f"{int(lengths[uneven[0]])}. Set batch.pad_multiple to a multiple of {num_chunks}."
        )


def num_chunks_of(cp_size: int) -> int:
    """Chunks that each sequence is cut into."""
    return 2 * cp_size if cp_size > 1 else 1


def segments_per_sequence(cp_size: int) -> int:
    """Chunks of each sequence that a rank holds, one after the other."""
    return num_chunks_of(cp_size) // cp_size


def local_indices(cu_seqlens_padded: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Rows of the packed sequence that a rank holds, in its own order.

    Args:
        cu_seqlens_padded: [S + 1] cumulative padded lengths, each length divisible by 2*cp.

    Returns:
        int64 [T_local].
    """
    cu_segments = local_cu_segments(cu_seqlens_padded, cp_size)
    starts = segment_starts(cu_seqlens_padded, cp_size, cp_rank)
    lengths = cu_segments.diff()
    offsets = torch.repeat_interleave(starts - cu_segments[:-1], lengths)
    return torch.arange(int(cu_segments[-1]), device=offsets.device) + offsets


def segment_starts(cu_seqlens_padded: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """First row, in the packed sequence, of each segment that a rank holds: int64 [S * segments_per_sequence]."""
    starts = cu_seqlens_padded[:-1].long()
    if cp_size == 1:
        return starts
    chunk = cu_seqlens_padded.diff().long() // num_chunks_of(cp_size)
    front = starts + chunk * cp_rank
    back = starts + chunk * (num_chunks_of(cp_size) - 1 - cp_rank)
    return torch.stack([front, back], dim=1).flatten()


def local_cu_segments(cu_seqlens_padded: Tensor, cp_size: int) -> Tensor:
    """Cumulative lengths of the segments that a rank holds: front and back chunk of each sequence, in turn.

    Returns:
        int64 [2 * S + 1], or [S + 1] without context parallelism; the same on every rank.
    """
    if cp_size == 1:
        return cu_seqlens_padded.long()
    chunk = cu_seqlens_padded.diff().long() // num_chunks_of(cp_size)
    lengths = chunk.repeat_interleave(2)
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def local_sequence_ids(cu_seqlens_padded: Tensor, cp_size: int) -> Tensor:
    """Which sequence each local row belongs to: int64 [T_local], the same on every rank."""
    lengths = cu_seqlens_padded.diff().long() // cp_size
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def gathered_positions(cu_seqlens_padded: Tensor, cp_size: int) -> Tensor:
    """Row of the packed sequence at each row of the ranks' local rows laid one after the other: int64 [T]."""
    return torch.cat([local_indices(cu_seqlens_padded, cp_size, rank) for rank in range(cp_size)])
