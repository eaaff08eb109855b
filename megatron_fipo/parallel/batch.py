"""Make one rank's microbatches from a step's groups: its data-parallel share, its context-parallel rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from megatron_fipo.rl.trajectory import Group, Trajectory

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


@dataclass(frozen=True)
class Division:
    """Who trains on what in a step; the same on every rank.

    Attributes:
        minibatches: [minibatch][data-parallel rank][microbatch] (which of the step's samples, tokens and padding).
    """

    minibatches: Sequence[Sequence[Sequence[tuple[list[int], int]]]]

    @property
    def wanted(self) -> list[set[int]]:
        """Which of the step's samples each data-parallel rank trains on."""
        found: list[set[int]] = [set() for _ in self.minibatches[0]]
        for shares in self.minibatches:
            for indices, share in zip(found, shares, strict=True):
                indices.update(index for microbatch, _ in share for index in microbatch)
        return found


def divide(lengths: Sequence[int], group_sizes: Sequence[int], config: Config, num_ranks: int) -> Division:
    """Cut a step's samples into minibatches, each of them into the microbatches of all data-parallel ranks.

    Microbatches are balanced in tokens over data-parallel ranks, and all ranks have the same number of them. Where
    stages pass activations on, all microbatches of a minibatch have the same length.

    Args:
        lengths: tokens of prompt and response of each of the step's samples, group after group.
        group_sizes: samples of each group; a minibatch has whole groups.
        num_ranks: data-parallel ranks.

    Raises:
        ValueError: if a sequence alone exceeds batch.max_tokens_per_microbatch.
    """
    minibatches = []
    starts = [0, *itertools.accumulate(group_sizes)]
    for groups in split_minibatches(len(group_sizes), config.train.num_minibatches):
        samples = range(starts[groups.start], starts[groups.stop])
        shares = _microbatches([lengths[index] for index in samples], config, num_ranks)
        minibatches.append(
            [[([samples[place] for place in places], total) for places, total in share] for share in shares]
        )
    return Division(minibatches)


def build_own_minibatches(
    division: Division,
    samples: Mapping[int, Trajectory],
    config: Config,
    ranks: ParallelGroups,
    pad_token_id: int,
    version: int | None = None,
) -> list[list[PackedBatch]]:
    """This rank's microbatches of a divided step. No communication.

    With rollout.too_stale=mask, tokens beyond the bound of staleness are left out of the loss.

    Args:
        samples: those that this data-parallel rank trains on, with their advantages, by their place in the batch.
        version: of the policy that trains on them; None leaves their staleness untold.

    Returns:
        [minibatch][microbatch], this rank's rows, on its device. `sample_indices` count through the step's samples.
    """
    rollout = config.rollout
    bound = rollout.max_staleness_steps if rollout.too_stale == "mask" else None
    return [
        [
            shard_batch(
                build_packed_batch(
                    samples,
                    indices,
                    pad_multiple(config),
                    pad_token_id,
                    total_tokens=total_tokens,
                    mask_truncated=config.reward.mask_truncated,
                    version=version,
                    max_staleness_steps=bound,
                ),
                ranks.cp,
                device(),
            )
            for indices, total_tokens in shares[ranks.dp.rank()]
        ]
        for shares in division.minibatches
    ]


def build_minibatches(
    groups: Sequence[Group], config: Config, ranks: ParallelGroups, pad_token_id: int, version: int | None = None
) -> list[list[PackedBatch]]:
    """`divide` groups that every rank has, and `build_own_minibatches`. No communication."""
    samples = [sample for group in groups for sample in group.samples]
    lengths, group_sizes = [sample.num_tokens for sample in samples], [len(group.samples) for group in groups]
    division = divide(lengths, group_sizes, config, ranks.dp.size())
    return build_own_minibatches(division, dict(enumerate(samples)), config, ranks, pad_token_id, version)


def build_scoring_batches(
    sequences: Sequence[Sequence[int]], config: Config, ranks: ParallelGroups
) -> list[PackedBatch]:
    """This rank's microbatches of sequences whose tokens, from the second on, are all asked for. No communication.

    Their response_mask has every token that another one precedes, and their sample_indices count the sequences. They
    are shared out as `divide` does it.

    Raises:
        ValueError: if a sequence is empty, or alone exceeds batch.max_tokens_per_microbatch.
    """
    lengths = [len(sequence) for sequence in sequences]
    if 0 in lengths:
        raise ValueError(
            f"sequence {lengths.index(0)} of {len(lengths)} has no token: there is nothing to score in it."
        )
    batches = []
    for microbatch, total_tokens in _microbatches(lengths, config, ranks.dp.size())[ranks.dp.rank()]:
        tokens = [torch.tensor(sequences[index]) for index in microbatch]
        batch = pack_tokens(tokens, microbatch, pad_multiple(config), _SCORING_PAD_TOKEN, total_tokens)
        for start, of_sequence in zip(batch.layout.cu_seqlens_padded.tolist(), tokens, strict=False):
            batch.response_mask[start : start + len(of_sequence) - 1] = True
        batches.append(shard_batch(batch, ranks.cp, device()))
    return batches


def _microbatches(lengths: Sequence[int], config: Config, num_ranks: int) -> list[list[tuple[list[int], int]]]:
    """[data-parallel rank][microbatch]: (which sequences, tokens with all padding)."""
    whole = microbatch_token_multiple(config)
    shares = pack(
        lengths,
        num_ranks=num_ranks,
        max_tokens=config.batch.max_tokens_per_microbatch // whole * whole,
        pad_multiple=pad_multiple(config),
        microbatch_multiple=config.parallel.pp if config.parallel.virtual_pp else 1,
    )
    totals = [[_padded_tokens([lengths[index] for index in part], config) for part in share] for share in shares]
    if config.parallel.pp > 1:
        longest = max(total for of_rank in totals for total in of_rank)
        totals = [[longest] * len(of_rank) for of_rank in totals]
    return [list(zip(share, of_rank, strict=True)) for share, of_rank in zip(shares, totals, strict=True)]


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
