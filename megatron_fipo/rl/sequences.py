"""What a rank knows of the whole sequences whose tokens, or a part of them, it holds.

The loss needs four things that no single token tells: which sequence it belongs to, what follows it, how many tokens
the response has, and who counts the sequence. `WholeSequences` is the answer of a process that holds all tokens;
`parallel.sharded_sequences` has that of a context-parallel rank.

Shapes: T packed tokens of this rank, S whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from megatron_fipo.rl.future_kl import segment_suffix_sum
from megatron_fipo.rl.segments import Segments, checked_cu_segments, segments_of


class Sequences(Protocol):
    """Whole sequences, as the loss sees them."""

    @property
    def ids(self) -> Tensor:
        """int64 [T], the sequence of each of this rank's tokens, on their device."""
        ...

    @property
    def num(self) -> int:
        """S."""
        ...

    @property
    def response_tokens(self) -> Tensor | None:
        """int64 [S], tokens of the whole of each response; None where only the mask tells."""
        ...

    @property
    def counts_here(self) -> bool:
        """Whether this rank counts the sequences: true on exactly one of the ranks that share them."""
        ...

    def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
        """Future-KL, and how many flags each sequence has; both over whole sequences, in one exchange if in any.

        Args:
            x: float32 [T], log-prob shifts of the tokens that take part, 0 elsewhere.
            flags: bool [T].

        Returns:
            (future_kl float32 [T], int64 [S]).
        """
        ...

    def suffix_sums(self, x: Sequence[Tensor], half_lives: Sequence[float]) -> list[Tensor]:
        """Several Future-KLs, each of its own x [T] and half-life, in one exchange if in any; float32 [T] each."""
        ...

    def total(self, per_sequence: Tensor) -> Tensor:
        """Sums over this rank's rows, [S, …], added up to sums over whole sequences, alike on all that share them."""
        ...


class WholeSequences:
    """Sequences that this process holds from their first token to their last. No communication.

    Args:
        cu_seqlens: [S + 1] integers, cumulative lengths of the sequences as they are laid out, padding included. On the
            CPU, it need not be waited for.
        device: that of the tokens; None takes that of cu_seqlens.

    Raises:
        ValueError: if cu_seqlens is no vector of integers that begins with 0 and does not descend.
    """

    response_tokens = None
    counts_here = True

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str | None = None) -> None:
        num_tokens = int(cu_seqlens[-1]) if cu_seqlens.dim() == 1 and cu_seqlens.numel() else 0
        self._cu_seqlens = checked_cu_segments(cu_seqlens, num_tokens)
        self._device = cu_seqlens.device if device is None else torch.device(device)
        self.num = len(self._cu_seqlens) - 1
        self.ids = sequence_ids_of(self._cu_seqlens, num_tokens, self._device)

    @cached_property
    def _segments(self) -> Segments:
        """Made where Future-KL asks for them, and once, however many updates are made on these sequences."""
        return segments_of(self._cu_seqlens, len(self.ids), self.ids.device)

    def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
        """See `Sequences.suffix_sum`."""
        return segment_suffix_sum(x, self._segments, half_life_tokens), count_per_sequence(flags, self.ids, self.num)

    def suffix_sums(self, x: Sequence[Tensor], half_lives: Sequence[float]) -> list[Tensor]:
        """See `Sequences.suffix_sums`."""
        return [
            segment_suffix_sum(each, self._segments, half_life) for each, half_life in zip(x, half_lives, strict=True)
        ]

    def total(self, per_sequence: Tensor) -> Tensor:
        """Return the argument: here sums are over whole sequences already."""
        return per_sequence


def sequence_ids_of(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """int64 [T]: the sequence to which each of `num_tokens` tokens belongs.

    Raises:
        ValueError: if the sequences have another number of tokens in all, as on a context-parallel rank.
    """
    lengths = cu_seqlens.diff().to(device=device, dtype=torch.int64)
    if int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens ends at {int(cu_seqlens[-1])} but there are {num_tokens} tokens. Pass the cumulative lengths "
            "of the layout in which the tokens lie, padding included; under context parallelism, ShardedSequences."
        )
    ids = torch.arange(lengths.shape[0], device=device)
    return torch.repeat_interleave(ids, lengths, output_size=num_tokens)


def count_per_sequence(mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """int64 [S]: True entries of mask [T] in each sequence."""
    counts = torch.zeros(num_sequences, dtype=torch.int64, device=mask.device)
    return counts.index_add_(0, sequence_ids, mask.to(torch.int64))
