"""Microbatches of packed sequences.

Shapes: T packed tokens (padding included), S sequences; `_local` means sharded over context-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_fipo.rl.packed_layout import PackedLayout
from megatron_fipo.rl.segments import Segments


@dataclass
class PackedBatch:
    """One microbatch of packed sequences, predictor-aligned: row t predicts `labels[t]`, the token that follows it.

    Each sequence is padded at its end to a multiple of the layout's pad_multiple. `layout` and `cu_seqlens_padded` are
    of whole sequences, also where the per-token tensors hold only this context-parallel rank's rows.
    """

    input_ids: Tensor
    """int64 [T] or [T_local]."""
    labels: Tensor
    """int64 [T]."""
    position_ids: Tensor
    """int64 [T], from 0 in each sequence."""
    response_mask: Tensor
    """bool [T], True where labels[t] was written by the policy and may carry loss."""
    advantages: Tensor
    """float32 [T]."""
    sequence_ids: Tensor
    """int64 [T], the sequence of each token."""
    layout: PackedLayout
    """Positions of the sequences, on the CPU."""
    cu_seqlens_padded: Tensor
    """int32 [S + 1], cumulative lengths with padding, on the batch's device: for attention's kernels."""
    response_token_counts: Tensor
    """int64 [S], True entries of response_mask in the whole of each sequence."""
    rollout_log_probs: Tensor
    """float32 [T], 0 outside the response."""
    sample_indices: list[int]
    """Position of each sequence's sample in the step's batch; -1 for a sequence that only fills the microbatch."""
    old_log_probs: Tensor | None = None
    """float32 [T], set before the step's first update."""
    reference_log_probs: Tensor | None = None
    """float32 [T], set where there is a KL penalty."""
    staleness_steps: Tensor | None = None
    """int32 [T], the version that trains on it less the one that wrote it, -1 where nobody recorded that; None where it
    is not told which version trains."""
    segments: Segments | None = None
    """This rank's stretches of each sequence, for Future-KL; set where the batch is brought to its rank's device."""
