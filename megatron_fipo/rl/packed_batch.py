"""Microbatches of packed sequences.

Shapes: T packed tokens (padding included), S sequences; `_local` means sharded over context-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.rl.segments import Segments


@dataclass(frozen=True)
class PackedLengths:
    """How long the whole packed sequences of a microbatch are, on the CPU and the same on every context-parallel rank.

    What wants a length as a number finds it here: read from a GPU, it would wait for all that was queued there.
    """

    cu_seqlens: Tensor
    """int64 [S + 1] on the CPU, cumulative lengths without padding."""
    cu_seqlens_padded: Tensor
    """int64 [S + 1] on the CPU, cumulative lengths with padding."""
    num_tokens: int
    """Tokens of all sequences, padding included."""

    @classmethod
    def of(cls, lengths: Sequence[int], padded: Sequence[int]) -> PackedLengths:
        """From each sequence's length without and with its padding."""
        cu_seqlens, cu_padded = (torch.tensor([0, *tokens]).cumsum(0) for tokens in (lengths, padded))
        return cls(cu_seqlens, cu_padded, num_tokens=sum(padded))


@dataclass
class PackedBatch:
    """One microbatch of packed sequences, predictor-aligned: row t predicts `labels[t]`, the token that follows it.

    Each sequence is padded at its end to a multiple of the layout's pad_multiple. `lengths` and `cu_seqlens_padded` are
    global, also where the per-token tensors hold only this context-parallel rank's rows.
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
    lengths: PackedLengths
    """Of the sequences, on the CPU."""
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
    segments: Segments | None = None
    """This rank's stretches of each sequence, for Future-KL; set where the batch is brought to its rank's device."""
