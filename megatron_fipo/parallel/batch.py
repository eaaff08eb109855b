"""Make one rank's microbatches from a step's groups: its data-parallel share, its context-parallel rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_fipo.config import Config, microbatch_token_multiple, pad_multiple
from megatron_fipo.parallel import cp_layout
from megatron_fipo.parallel.groups import ParallelGroups, device
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packed_layout import round_up
from megatron_fipo.rl.packing import build_packed_batch, pack, pack_tokens, split_minibatches
from megatron_fipo.rl.segments import segments_of
from megatron_fipo.rl.trajectory import Group

_PER_TOKEN = (
    "input_ids",
    "labels",
    "position_ids",
    "response_mask",
    "advantages",
    "rollout_log_probs",
    "staleness_steps",
    "sequence_ids",
)
_PER_SEQUENCE = ("cu_seqlens_padded", "response_token_counts")
_SCORING_PAD_TOKEN = 0
"""Padding of scored sequences: every vocabulary has this token, and no other token sees it."""


def build_minibatches(
    groups: Sequence[Group], config: Config, ranks: ParallelGroups, pad_token_id: int, version: int | None = None
) -> list[list[PackedBatch]]:
    """Cut a step's groups into minibatches, each of them into this rank's microbatches. No communication.

    Every rank sees all groups and comes to the same division: microbatches are balanced in tokens over data-parallel
    ranks, and all ranks have the same number of them. Where stages pass activations on, all microbatches of a
    minibatch have the same length.

    Args:
        version: of the policy that trains on them; None leaves their staleness untold.

    Returns:
        [minibatch][microbatch], this rank's rows, on its device. `sample_indices` count through the step's samples.

    Raises:
        ValueError: if a sequence alone exceeds batch.max_tokens_per_microbatch.
    """
    samples = [sample for group in groups for sample in group.samples]
    position = {id(sample): index for index, sample in enumerate(samples)}
    minibatches = []
    for members in split_minibatches(groups, config.train.num_minibatches):
        indices = [position[id(sample)] for group in members for sample in group.samples]
        lengths = [samples[index].num_tokens for index in indices]
        minibatches.append(
            [
                shard_batch(
                    build_packed_batch(
                        samples,
                        [indices[place] for place in microbatch],
                        pad_multiple(config),
                        pad_token_id,
                        total_tokens=total_tokens,
                        mask_truncated=config.reward.mask_truncated,
                        version=version,
                    ),
                    ranks.cp,
                    device(),
                )
                for microbatch, total_tokens in _own_microbatches(lengths, config, ranks)
            ]
        )
    return minibatches


def build_scoring_batches(
    sequences: Sequence[Sequence[int]], config: Config, ranks: ParallelGroups
) -> list[PackedBatch]:
    """This rank's microbatches of sequences whose tokens, from the second on, are all asked for. No communication.

    Their response_mask has every token that another one precedes, and their sample_indices count the sequences. They
    are shared out as `build_minibatches` does it.

    Raises:
        ValueError: if a sequence is empty, or alone exceeds batch.max_tokens_per_microbatch.
    """
    lengths = [len(sequence) for sequence in sequences]
    if 0 in lengths:
        raise ValueError(
            f"sequence {lengths.index(0)} of {len(lengths)} has no token: there is nothing to score in it."
        )
    batches = []
    for microbatch, total_tokens in _own_microbatches(lengths, config, ranks):
        tokens = [torch.tensor(sequences[index]) for index in microbatch]
        batch = pack_tokens(tokens, microbatch, pad_multiple(config), _SCORING_PAD_TOKEN, total_tokens)
        for start, of_sequence in zip(batch.layout.cu_seqlens_padded.tolist(), tokens, strict=False):
            batch.response_mask[start : start + len(of_sequence) - 1] = True
        batches.append(shard_batch(batch, ranks.cp, device()))
    return batches


def _own_microbatches(lengths: Sequence[int], config: Config, ranks: ParallelGroups) -> list[tuple[list[int], int]]:
    """(which sequences, tokens with all padding) for each of this rank's microbatches."""
    whole = microbatch_token_multiple(config)
    shares = pack(
        lengths,
        num_ranks=ranks.dp.size(),
        max_tokens=config.batch.max_tokens_per_microbatch // whole * whole,
        pad_multiple=pad_multiple(config),
        microbatch_multiple=config.parallel.pp if config.parallel.virtual_pp else 1,
    )
    totals = [[_padded_tokens([lengths[index] for index in part], config) for part in share] for share in shares]
    if config.parallel.pp > 1:
        longest = max(total for of_rank in totals for total in of_rank)
        totals = [[longest] * len(of_rank) for of_rank in totals]
    return list(zip(shares[ranks.dp.rank()], totals[ranks.dp.rank()], strict=True))


def _padded_tokens(lengths: Sequence[int], config: Config) -> int:
    """Tokens of a microbatch of sequences with all padding; none make one filler sequence."""
    multiple, whole = pad_multiple(config), microbatch_token_multiple(config)
    tokens = sum(round_up(length, multiple) for length in lengths)
    return max(round_up(tokens, whole), whole)


def shard_batch(batch: PackedBatch, cp_group: ProcessGroup, device: torch.device) -> PackedBatch:
    """This rank's rows of a whole microbatch, in zigzag order, on `device`. No communication.

    Labels were shifted before, on the whole sequences, so that no label is lost where a chunk ends. All that forward,
    loss and backward need of the lengths goes to the device here, once: none of them reads it back.

    Raises:
        ValueError: if a padded length does not divide into the layout's chunks.
    """
    layout = replace(batch.layout, cp_size=cp_group.size(), cp_rank=cp_group.rank())
    cu_seqlens_padded = layout.cu_seqlens_padded
    cp_layout.check_padded(cu_seqlens_padded, layout.cp_size)
    rows = cp_layout.local_indices(cu_seqlens_padded, layout.cp_size, layout.cp_rank)
    cu_segments = cp_layout.local_cu_segments(cu_seqlens_padded, layout.cp_size)
    given = {name: getattr(batch, name) for name in _PER_TOKEN}
    fields: dict[str, Any] = {name: value[rows].to(device) for name, value in given.items() if value is not None}
    fields |= {name: getattr(batch, name).to(device) for name in _PER_SEQUENCE}
    return replace(batch, layout=layout, segments=segments_of(cu_segments, len(rows), device), **fields)
