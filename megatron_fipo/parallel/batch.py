"""From a step's groups to the microbatches of one rank: its data-parallel share, its context-parallel rows."""

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
from megatron_fipo.rl.packing import build_packed_batch, pack, split_minibatches
from megatron_fipo.rl.segments import segments_of
from megatron_fipo.rl.trajectory import Group, Trajectory

_PER_TOKEN = ("input_ids", "labels", "position_ids", "response_mask", "advantages", "rollout_log_probs", "sequence_ids")
_PER_SEQUENCE = ("cu_seqlens_padded", "response_token_counts")


def build_minibatches(
    groups: Sequence[Group], config: Config, ranks: ParallelGroups, pad_token_id: int
) -> list[list[PackedBatch]]:
    """Cut a step's groups into minibatches, each of them into this rank's microbatches. No communication.

    Every rank sees all groups and comes to the same division: microbatches are balanced in tokens over data-parallel
    ranks, and all ranks have the same number of them. Where stages pass activations on, all microbatches of a
    minibatch have the same length.

    Returns:
        [minibatch][microbatch], this rank's rows, on its device. `sample_indices` count through the step's samples.

    Raises:
        ValueError: if a sequence alone exceeds batch.max_tokens_per_microbatch.
    """
    multiple, whole = pad_multiple(config), microbatch_token_multiple(config)
    samples = [sample for group in groups for sample in group.samples]
    position = {id(sample): index for index, sample in enumerate(samples)}
    minibatches = []
    for members in split_minibatches(groups, config.train.num_minibatches):
        indices = [position[id(sample)] for group in members for sample in group.samples]
        shares = pack(
            [samples[index].num_tokens for index in indices],
            num_ranks=ranks.dp.size(),
            max_tokens=config.batch.max_tokens_per_microbatch // whole * whole,
            pad_multiple=multiple,
            microbatch_multiple=config.parallel.pp if config.parallel.virtual_pp else 1,
        )
        shares = [[[indices[place] for place in microbatch] for microbatch in share] for share in shares]
        longest = max(padded_tokens(samples, microbatch, config) for share in shares for microbatch in share)
        minibatches.append(
            [
                shard_batch(
                    build_packed_batch(
                        samples,
                        microbatch,
                        multiple,
                        pad_token_id,
                        total_tokens=longest if config.parallel.pp > 1 else padded_tokens(samples, microbatch, config),
                        mask_truncated=config.reward.mask_truncated,
                    ),
                    ranks.cp,
                    device(),
                )
                for microbatch in shares[ranks.dp.rank()]
            ]
        )
    return minibatches


def padded_tokens(samples: Sequence[Trajectory], indices: Sequence[int], config: Config) -> int:
    """Tokens of a microbatch of these samples with all padding; none make one filler sequence."""
    multiple, whole = pad_multiple(config), microbatch_token_multiple(config)
    tokens = sum(round_up(samples[index].num_tokens, multiple) for index in indices)
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
    fields: dict[str, Any] = {name: getattr(batch, name)[rows].to(device) for name in _PER_TOKEN}
    fields |= {name: getattr(batch, name).to(device) for name in _PER_SEQUENCE}
    return replace(batch, layout=layout, segments=segments_of(cu_segments, len(rows), device), **fields)
