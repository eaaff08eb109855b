"""Future-KL over sequences that are sharded across context-parallel ranks.

Each rank scans its own zigzag chunks. A chunk's influence on the chunks before it is one number, the chunk's own
discounted sum at its first token ("head"), so what crosses ranks is one all-gather of 12 * cp bytes a sequence: two
heads and the sequence filter's count from every rank. Nothing of the sequence's length is ever gathered.

Shapes: T_local rows of this rank, S sequences, C = 2*cp chunks a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.config import Config
from megatron_fipo.metrics.reductions import Max, Metrics
from megatron_fipo.parallel import cp_layout, exchange
from megatron_fipo.rl.future_kl import decay_to_end, segment_heads, segment_suffix_sum
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.segments import Segments, segments_of, to_device
from megatron_fipo.rl.sequences import count_per_sequence

if TYPE_CHECKING:  # it stands on Megatron, which plain tensors do without
    from megatron_fipo.parallel.groups import ParallelGroups


def cp_future_kl(
    x_local: Tensor,
    cu_seqlens_padded: Tensor,
    half_life_tokens: float,
    cp_group: ProcessGroup,
    dual_clipped_local: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Suffix sum F_t = x_t + 2^(-1/half_life) F_{t+1} within each sequence, over all context-parallel ranks.

    Collective over `cp_group` (one all-gather, at any length), not differentiable. Waits for the device if
    `cu_seqlens_padded` lies on one; `ShardedSequences` has tables that are made already.

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
    cp_size, cu_padded = cp_group.size(), cu_seqlens_padded.cpu()
    cp_layout.check_padded(cu_padded, cp_size)
    cu_segments = cp_layout.local_cu_segments(cu_padded, cp_size)
    if len(x_local) != int(cu_segments[-1]):
        raise ValueError(
            f"x_local has {len(x_local)} rows where cu_seqlens_padded gives {int(cu_segments[-1])} to each rank"
        )
    segments = segments_of(cu_segments, len(x_local), x_local.device)
    num_sequences = len(cu_padded) - 1
    if dual_clipped_local is None:
        counts = torch.zeros(num_sequences, dtype=torch.int64, device=x_local.device)
        return segment_future_kl(x_local, counts, segments, half_life_tokens, cp_group)[0]
    sequence_ids = to_device(cp_layout.local_sequence_ids(cu_padded, cp_size), x_local.device)
    counts = count_per_sequence(dual_clipped_local, sequence_ids, num_sequences)
    return segment_future_kl(x_local, counts, segments, half_life_tokens, cp_group)


def segment_future_kl(
    x_local: Tensor, counts: Tensor, segments: Segments, half_life_tokens: float, cp_group: ProcessGroup
) -> tuple[Tensor, Tensor]:
    """`cp_future_kl` of segments that are made already. Collective; nothing is read from the device nor sent there.

    Args:
        counts: int64 [S], of this rank's rows.

    Returns:
        (future_kl [T_local], counts summed over the ranks).
    """
    future_kl = segment_suffix_sum(x_local, segments, half_life_tokens)
    if cp_group.size() == 1:
        return future_kl, counts
    heads = segment_heads(future_kl, segments).view(len(counts), 2)
    own = torch.cat([heads, counts.to(heads.dtype)[:, None]], dim=1)
    gathered = torch.stack(exchange.all_gather_tensors(own, cp_group))
    future_kl = _with_carries(future_kl, gathered[:, :, :2], segments, half_life_tokens, cp_group)
    return future_kl, gathered[:, :, 2].sum(0).round().long()


def segment_future_kls(
    x_local: Sequence[Tensor], segments: Segments, half_lives: Sequence[float], cp_group: ProcessGroup
) -> list[Tensor]:
    """Several Future-KLs of the same segments, each of its own x and half-life: [T_local] each.

    As `segment_future_kl`, without counts. Collective: one all-gather for all of them, 8 * cp bytes a sequence each.
    """
    sums = [segment_suffix_sum(x, segments, half_life) for x, half_life in zip(x_local, half_lives, strict=True)]
    if cp_group.size() == 1:
        return sums
    own = torch.stack([segment_heads(each, segments).view(-1, 2) for each in sums])
    gathered = torch.stack(exchange.all_gather_tensors(own, cp_group))
    return [
        _with_carries(each, gathered[:, index], segments, half_life, cp_group)
        for index, (each, half_life) in enumerate(zip(sums, half_lives, strict=True))
    ]


def _with_carries(
    chunk_sums: Tensor, gathered_heads: Tensor, segments: Segments, half_life_tokens: float, cp_group: ProcessGroup
) -> Tensor:
    """[T_local] the sums over whole sequences, from those within this rank's chunks and every rank's heads."""
    chunk_lengths = segments.lengths_on_device[::2]
    carries = carries_into_chunks(gathered_heads, chunk_lengths, half_life_tokens)
    own_carries = torch.stack([carries[cp_group.rank()], carries[-1 - cp_group.rank()]], dim=1).flatten()
    return chunk_sums + decay_to_end(segments, half_life_tokens) * segments.per_token(own_carries)


def exchanged_bytes(num_sequences: int, cp_size: int, *, future_kl: bool = True, num_shadows: int = 0) -> int:
    """Bytes that each rank receives for the Future-KL of an update on these sequences, its own part included.

    Args:
        future_kl: whether the objective has one, whose heads travel with the filter's counts.
        num_shadows: shadow objectives.
    """
    of_a_sequence = (12 if future_kl else 0) + 8 * num_shadows
    return of_a_sequence * cp_size * num_sequences if cp_size > 1 else 0


def exchange_metrics(minibatches: Sequence[Sequence[PackedBatch]], config: Config, ranks: ParallelGroups) -> Metrics:
    """Return the bytes that this rank receives in a step's exchanges; merged over ranks, those of the busiest rank.

    Data-parallel ranks have different sequences, and only the last pipeline stage has a loss. The busiest rank is the
    one that the others wait for. No communication; empty where neither objective nor shadow has a Future-KL.
    """
    objective = config.objective
    if not (objective.future_kl or objective.shadow):
        return {}
    num_sequences = sum(batch.layout.num_sequences for batches in minibatches for batch in batches)
    of_an_epoch = exchanged_bytes(
        num_sequences, ranks.cp.size(), future_kl=objective.future_kl, num_shadows=len(objective.shadow)
    )
    received = of_an_epoch * config.train.num_epochs
    return {"perf/suffix_sum_exchange_bytes": Max(received if ranks.is_last_stage else 0)}


def carries_into_chunks(gathered_heads: Tensor, chunk_lengths: Tensor, half_life_tokens: float) -> Tensor:
    """Return what the tokens after each chunk contribute at the chunk's end.

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
