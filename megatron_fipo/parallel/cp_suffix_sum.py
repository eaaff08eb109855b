"""Future-KL over sequences that are sharded across context-parallel ranks.

Each rank scans its own zigzag chunks. A chunk's influence on the chunks before it is one number, the chunk's own
discounted sum at its first token ("head"), so what crosses ranks is one all-gather of 12 * cp bytes a sequence: two
heads and the sequence filter's count from every rank. Nothing of the sequence's length is ever gathered.

Shapes: T_local rows of this rank, S sequences, C = 2*cp chunks a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import cp_layout, exchange
from megatron_fipo.rl.future_kl import decay_to_end, segment_heads, segment_suffix_sum
from megatron_fipo.rl.objective import SuffixSum, count_per_sequence


def cp_future_kl(
    x_local: Tensor,
    cu_seqlens_padded: Tensor,
    half_life_tokens: float,
    cp_group: ProcessGroup,
    dual_clipped_local: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Suffix sum F_t = x_t + 2^(-1/half_life) F_{t+1} within each sequence, over all context-parallel ranks.

    Collective over `cp_group` (one all-gather, at any length), not differentiable.

    Args:
        x_local: float32 [T_local], masked log-prob shifts of this rank's rows in zigzag order.
        cu_seqlens_padded: int [S + 1], global cumulative padded lengths, each length divisible by 2*cp.
        half_life_tokens: distance at which influence halves.
        cp_group: the context-parallel group of this batch.
        dual_clipped_local: bool [T_local], tokens that the sequence filter counts.

    Returns:
        future_kl float32 [T_local]; with `dual_clipped_local` also their number in each whole sequence, int64 [S].

    Raises:
        ValueError: if a padded length does not divide into the chunks, or x_local has another length than the layout.

    Source: arXiv 2603.19835, Future-KL; the exchange is this project's.
    """
    cp_size, cp_rank = cp_group.size(), cp_group.rank()
    cp_layout.check_padded(cu_seqlens_padded, cp_size)
    cu_segments = cp_layout.local_cu_segments(cu_seqlens_padded, cp_size)
    if len(x_local) != int(cu_segments[-1]):
        raise ValueError(
            f"x_local has {len(x_local)} rows where cu_seqlens_padded gives {int(cu_segments[-1])} to each rank"
        )
    future_kl = segment_suffix_sum(x_local, cu_segments, half_life_tokens)
    num_sequences = len(cu_seqlens_padded) - 1
    counts = None
    if dual_clipped_local is not None:
        sequence_ids = cp_layout.local_sequence_ids(cu_seqlens_padded, cp_size)
        counts = count_per_sequence(dual_clipped_local, sequence_ids, num_sequences)
    if cp_size > 1:
        heads = segment_heads(future_kl, cu_segments).view(num_sequences, 2)
        own_counts = heads.new_zeros(num_sequences) if counts is None else counts.to(heads.dtype)
        own = torch.cat([heads, own_counts[:, None]], dim=1)
        gathered = torch.stack(exchange.all_gather_tensors(own, cp_group))
        chunk_lengths = cu_seqlens_padded.diff() // cp_layout.num_chunks_of(cp_size)
        carries = carries_into_chunks(gathered[:, :, :2], chunk_lengths, half_life_tokens)
        own_carries = torch.stack([carries[cp_rank], carries[-1 - cp_rank]], dim=1).flatten()
        carry_per_row = own_carries.repeat_interleave(cu_segments.diff())
        future_kl = future_kl + decay_to_end(cu_segments, half_life_tokens) * carry_per_row
        if counts is not None:
            counts = gathered[:, :, 2].sum(0).round().long()
    return future_kl if counts is None else (future_kl, counts)


def sharded_suffix_sum(half_life_tokens: float, cp_group: ProcessGroup) -> SuffixSum:
    """`cp_future_kl` in the form in which `rl.objective.policy_loss` takes it."""

    def suffix_sum(x: Tensor, dual_clipped: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        result = cp_future_kl(x, cu_seqlens, half_life_tokens, cp_group, dual_clipped)
        assert isinstance(result, tuple)
        return result

    return suffix_sum


def exchanged_bytes(num_sequences: int, cp_size: int) -> int:
    """Bytes that each rank receives in `cp_future_kl`'s exchange, its own part included."""
    return 12 * cp_size * num_sequences if cp_size > 1 else 0


def carries_into_chunks(gathered_heads: Tensor, chunk_lengths: Tensor, half_life_tokens: float) -> Tensor:
    """What the tokens after each chunk contribute at the chunk's end.

    carry_{C-1} = 0, carry_c = head_{c+1} + gamma^length * carry_{c+1}, in float64.

    Args:
        gathered_heads: float32 [cp, S, 2], each rank's heads of its front and back chunks.
        chunk_lengths: int [S].

    Returns:
        float32 [C, S].
    """
    front, back = gathered_heads[:, :, 0], gathered_heads[:, :, 1]
    heads = torch.cat([front, back.flip(0)]).double()
    decay = torch.exp2(-chunk_lengths.double() / half_life_tokens)
    carries = torch.zeros_like(heads)
    for chunk in range(len(heads) - 2, -1, -1):
        carries[chunk] = heads[chunk + 1] + decay * carries[chunk + 1]
    return carries.float()
