"""Where the sequences of a packed microbatch lie: integers on the host, made once.

What wants a length as a number finds it here: read from a GPU, it would wait for all that was queued there.

Shapes: S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


def round_up(number: int, multiple: int) -> int:
    """The least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class PackedLayout:
    """The whole packed sequences of a microbatch, one after the other, and which of their rows a rank holds.

    All but `cp_rank` and what follows from it is the same on every context-parallel rank.
    """

    lengths: tuple[int, ...]
    """Tokens of each sequence without padding."""
    padded: tuple[int, ...]
    """Tokens of each sequence with the padding at its end; where the batch is sharded, multiples of 2 * cp_size."""
    cp_size: int = 1
    """Ranks that share the sequences; 1 until the batch is sharded."""
    cp_rank: int = 0
    """Which of them this is."""

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all whole sequences, padding included."""
        return sum(self.padded)

    @property
    def num_sequences(self) -> int:
        """S."""
        return len(self.padded)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int64 [S + 1] on the CPU, cumulative lengths without padding."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    @cached_property
    def cu_seqlens_padded(self) -> Tensor:
        """int64 [S + 1] on the CPU, cumulative lengths with padding."""
        return torch.tensor([0, *self.padded]).cumsum(0)

    def rows_of(self, sequence: int) -> slice:
        """Return this rank's rows of a sequence: they are consecutive, and every rank has equally many."""
        return slice(self._bounds[sequence], self._bounds[sequence + 1])

    @cached_property
    def _bounds(self) -> tuple[int, ...]:
        """[S + 1], where each sequence begins among this rank's rows."""
        return tuple(total // self.cp_size for total in accumulate(self.padded, initial=0))
