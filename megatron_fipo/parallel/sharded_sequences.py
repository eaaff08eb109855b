"""Sequences whose tokens lie on several ranks, as the loss sees them. Needs torch.distributed and nothing of Megatron.

Shapes: T_local rows of this rank, S whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.parallel import cp_layout, cp_suffix_sum, exchange
from megatron_fipo.rl.segments import Segments, segments_of, to_device
from megatron_fipo.rl.sequences import count_per_sequence


@dataclass(frozen=True, eq=False)
class ShardedSequences:
    """`Sequences` of a context-parallel rank: it holds two chunks of each sequence (see `cp_layout`).

    Made by `of` from lengths; a batch that has its tables already hands them over. Neither making it nor its fields
    cost communication; its methods are collective over `cp_group` where that has more than one rank.
    """

    ids: Tensor
    """int64 [T_local], the sequence of each row, on the tokens' device."""
    segments: Segments
    """This rank's one or two stretches of each sequence."""
    cp_group: ProcessGroup
    """The ranks that share the sequences; any group of torch.distributed."""
    response_tokens: Tensor | None = None
    """int64 [S], tokens of the whole of each response; None: an all-gather finds out where the objective asks."""

    @classmethod
    def of(
        cls, cu_seqlens: Tensor, cp_group: ProcessGroup, device: torch.device | str | None = None
    ) -> ShardedSequences:
        """Make the sequences from their plain lengths.

        Args:
            cu_seqlens: [S + 1] integers, cumulative lengths of the whole sequences, padding included, each length
                divisible by 2 * cp: the same on every rank. On the CPU, nothing waits for a device.
            cp_group: the ranks that share the sequences, in the order of their chunks.
            device: that of the tokens; None takes that of cu_seqlens.

        Raises:
            ValueError: if a length does not divide into the chunks, or cu_seqlens does not ascend from 0.
        """
        device = cu_seqlens.device if device is None else torch.device(device)
        cu_seqlens, size = cu_seqlens.cpu(), cp_group.size()
        cp_layout.check_padded(cu_seqlens, size)
        ids = cp_layout.local_sequence_ids(cu_seqlens, size)
        segments = segments_of(cp_layout.local_cu_segments(cu_seqlens, size), len(ids), device)
        return cls(to_device(ids, device), segments, cp_group)

    @property
    def num(self) -> int:
        """S."""
        return (len(self.segments.cu) - 1) // cp_layout.segments_per_sequence(self.cp_group.size())

    @property
    def counts_here(self) -> bool:
        """Whether this rank counts the sequences that the group shares: its first one does."""
        return self.cp_group.rank() == 0

    @property
    def rows(self) -> Tensor:
        """int64 [T_local] on the CPU: the rows of the whole packed batch that this rank holds, in its own order."""
        size = self.cp_group.size()
        cu_seqlens = self.segments.cu[:: cp_layout.segments_per_sequence(size)] * size
        return cp_layout.local_indices(cu_seqlens, size, self.cp_group.rank())

    def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
        """Future-KL, and the number of flags in each sequence, over all ranks. Collective: one all-gather.

        See `Sequences.suffix_sum`. Not differentiable; nothing is read from the device nor sent to it.
        """
        counts = count_per_sequence(flags, self.ids, self.num)
        return cp_suffix_sum.segment_future_kl(x, counts, self.segments, half_life_tokens, self.cp_group)

    def suffix_sums(self, x: Sequence[Tensor], half_lives: Sequence[float]) -> list[Tensor]:
        """See `Sequences.suffix_sums`. Collective: one all-gather. Nothing is read from the device nor sent to it."""
        return cp_suffix_sum.segment_future_kls(x, self.segments, half_lives, self.cp_group)

    def total(self, per_sequence: Tensor) -> Tensor:
        """[S, …] added up in the order of the ranks, so that all have the same bits. Collective: one all-gather."""
        return torch.stack(exchange.all_gather_tensors(per_sequence, self.cp_group)).sum(0)
