"""Log-probs of a step's responses, out of sharded microbatches and back into them, in whatever layout those are.

A checkpoint between the updates of a step holds the old policy's log-probs: the weights that gave them are gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packing import FILLER


def gather_old_log_probs(
    minibatches: Sequence[Sequence[PackedBatch]], groups: ParallelGroups
) -> dict[int, tuple[Tensor, Tensor]]:
    """Collect `old_log_probs` from all ranks. Collective over all ranks.

    Returns:
        For each sample of the step's batch: (int64 [R] positions of the predicting tokens in the sequence, ascending;
        float32 [R] log-probs), of the tokens in its response mask, on the CPU; the same on every rank.
    """
    own: dict[int, list[tuple[Tensor, Tensor]]] = {}
    if groups.reports_loss:
        for batch, sample, rows in _sequences(minibatches):
            assert batch.old_log_probs is not None
            rows = rows[batch.response_mask[rows]]
            part = (batch.position_ids[rows].cpu(), batch.old_log_probs[rows].cpu())
            own.setdefault(sample, []).append(part)
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for found in exchange.all_gather_objects(own, groups.world):
        for sample, pieces in found.items():
            parts.setdefault(sample, []).extend(pieces)
    whole = {}
    for sample, pieces in sorted(parts.items()):
        positions = torch.cat([positions for positions, _ in pieces])
        order = positions.argsort()
        whole[sample] = (positions[order], torch.cat([values for _, values in pieces])[order])
    return whole


def set_old_log_probs(minibatches: Sequence[Sequence[PackedBatch]], saved: Mapping[int, tuple[Tensor, Tensor]]) -> None:
    """Put log-probs that `gather_old_log_probs` collected back onto this rank's rows. No communication.

    Raises:
        ValueError: if a response token has none: the batch is not the one that they were collected from.
    """
    for batches in minibatches:
        for batch in batches:
            batch.old_log_probs = torch.zeros_like(batch.rollout_log_probs)
    for batch, sample, rows in _sequences(minibatches):
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
        assert batch.old_log_probs is not None
        batch.old_log_probs[rows] = values[places].to(batch.old_log_probs.device)


def _sequences(minibatches: Sequence[Sequence[PackedBatch]]) -> Iterator[tuple[PackedBatch, int, Tensor]]:
    """(microbatch, sample, this rank's rows of it), fillers left out."""
    for batches in minibatches:
        for batch in batches:
            for position, sample in enumerate(batch.sample_indices):
                if sample != FILLER:
                    rows = batch.layout.rows_of(position)
                    yield batch, sample, torch.arange(rows.start, rows.stop, device=batch.input_ids.device)
