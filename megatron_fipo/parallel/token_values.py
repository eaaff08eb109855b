"""Values of single tokens, taken out of sharded microbatches and put back into them, in whatever layout those are.

A checkpoint between the updates of a step holds the old policy's log-probs in this form, because the weights that gave
them are gone; and `Actor.score` returns its log-probs by it.

Shapes: T_local tokens of a microbatch on this context-parallel rank, N tokens of one sequence that count.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packing import FILLER

BySequence = dict[int, tuple[Tensor, Tensor]]
"""For each sequence, by its `sample_indices`: (int64 [N] positions of the predicting tokens, ascending; [N] values of
the tokens that they predict), on the CPU."""


def gather_token_values(batches: Sequence[PackedBatch], values: Sequence[Tensor], ranks: ParallelGroups) -> BySequence:
    """Collect a value of each token in `response_mask` from all ranks. Collective over all ranks.

    Args:
        batches: this rank's microbatches.
        values: [T_local] for each of them, on ranks that end the pipeline; those of other ranks are not looked at.

    Returns:
        The values of every sequence of every rank's microbatches, the same on every rank.
    """
    own: BySequence = {}
    if ranks.reports_loss:
        for batch, of_batch in zip(batches, values, strict=True):
            for sequence, rows in _sequences(batch):
                rows = rows[batch.response_mask[rows]]
                own[sequence] = (batch.position_ids[rows].cpu(), of_batch[rows].cpu())
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for found in exchange.all_gather_objects(own, ranks.world):
        for sequence, part in found.items():
            parts.setdefault(sequence, []).append(part)
    whole = {}
    for sequence, pieces in sorted(parts.items()):
        positions = torch.cat([positions for positions, _ in pieces])
        order = positions.argsort()
        whole[sequence] = (positions[order], torch.cat([part for _, part in pieces])[order])
    return whole


def gather_old_log_probs(minibatches: Sequence[Sequence[PackedBatch]], ranks: ParallelGroups) -> BySequence:
    """Collect a step's `old_log_probs`, by position in the step's batch. Collective over all ranks."""
    batches = [batch for microbatches in minibatches for batch in microbatches]
    own = [batch.old_log_probs for batch in batches if batch.old_log_probs is not None]
    return gather_token_values(batches, own, ranks)


def set_old_log_probs(minibatches: Sequence[Sequence[PackedBatch]], saved: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Put log-probs that `gather_old_log_probs` collected back onto this rank's rows. No communication.

    Raises:
        ValueError: if a response token has none: the batch is not the one that they were collected from.
    """
    for batch in (batch for microbatches in minibatches for batch in microbatches):
        old_log_probs = torch.zeros_like(batch.rollout_log_probs)
        for sample, rows in _sequences(batch):
            rows = rows[batch.response_mask[rows]]
            if not len(rows):
                continue
            wanted = batch.position_ids[rows].cpu()
            positions, values = saved.get(sample, (wanted[:0], torch.empty(0)))
            places = torch.searchsorted(positions, wanted).clamp(max=max(len(positions) - 1, 0))
            if not len(positions) or not torch.equal(positions[places], wanted):
                raise ValueError(
                    f"the checkpoint holds no log-probs of the old policy for sample {sample} of the step's batch: its "
                    "rollouts are not those that the step began with."
                )
            old_log_probs[rows] = values[places].to(old_log_probs.device)
        batch.old_log_probs = old_log_probs


def _sequences(batch: PackedBatch) -> Iterator[tuple[int, Tensor]]:
    """(sequence, this rank's rows of it) for each sequence of a microbatch that is no filler."""
    for position, sequence in enumerate(batch.sample_indices):
        if sequence != FILLER:
            rows = batch.layout.rows_of(position)
            yield sequence, torch.arange(rows.start, rows.stop, device=batch.input_ids.device)
