"""A context-parallel rank's part of a microbatch."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import cp_layout
from megatron_fipo.rl.types import PackedBatch

_PER_TOKEN = ("input_ids", "labels", "position_ids", "response_mask", "advantages", "rollout_log_probs")
_PER_SEQUENCE = ("cu_seqlens", "cu_seqlens_padded", "response_token_counts")


def shard_batch(batch: PackedBatch, cp_group: ProcessGroup, device: torch.device) -> PackedBatch:
    """This rank's rows of a whole microbatch, in zigzag order, on `device`. No communication.

    Labels were shifted before, on the whole sequences, so that no label is lost where a chunk ends.

    Raises:
        ValueError: if a padded length does not divide into the layout's chunks.
    """
    cp_layout.check_padded(batch.cu_seqlens_padded, cp_group.size())
    rows = cp_layout.local_indices(batch.cu_seqlens_padded, cp_group.size(), cp_group.rank())
    fields: dict[str, Tensor] = {name: getattr(batch, name)[rows].to(device) for name in _PER_TOKEN}
    fields |= {name: getattr(batch, name).to(device) for name in _PER_SEQUENCE}
    return replace(batch, **fields)
