"""The words of a text and its pieces of letters, by place and hash, found for all of it at once.

A long response has thousands of words, and only a few are looked for. Comparing hashes in arrays is ten times as fast
as making a text of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

_SPACE, _MARK, _LATIN, _OTHER_LETTER = range(4)
_FIRST_NOT_LATIN = 0x370
_LAST_TOLD_APART = 0xFFFF
_FACTOR = 0x9E3779B97F4A7C15
_MASK = 2**64 - 1


class Words:
    """A text's words and pieces.

    Args:
        text: any; hashes are of its characters as they are.
    """

    def __init__(self, text: str) -> None:
        self.codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        """The text's characters, as numbers."""
        self._kinds = _kinds_of_characters()[np.minimum(self.codes, _LAST_TOLD_APART)]
        factors, self._inverses = _factors(max(len(self.codes), 1).bit_length())
        # Sums wrap: the hash of a stretch is a difference of them, moved to the beginning.
        self._sums = np.cumsum((self.codes.astype(np.uint64) + np.uint64(1)) * factors[: len(self.codes)])

    @cached_property
    def has_other_scripts(self) -> bool:
        """Whether there may be letters of a script that is not Latin."""
        return bool((self._kinds == _OTHER_LETTER).any() or (self.codes > _LAST_TOLD_APART).any())

    @cached_property
    def word_hashes(self) -> NDArray[np.uint64]:
        """Hashes of the words, in order: of what stands between white space."""
        return self._stretches(self._kinds != _SPACE)[1]

    @cached_property
    def pieces(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Places and hashes of the pieces of letters, in order."""
        return self._stretches(self._kinds >= _LATIN)

    def without_spaces(self) -> NDArray[np.uint64]:
        """The characters but white space, as numbers."""
        return self.codes[self._kinds != _SPACE].astype(np.uint64)

    def places_of(self, wanted: Wanted) -> list[tuple[int, int]]:
        """(place, hash) of the pieces that are wanted, in order."""
        places, hashes = self.pieces
        perhaps = np.flatnonzero(wanted.last_bits[hashes & np.uint64(len(wanted.last_bits) - 1)])
        found = perhaps[np.isin(hashes[perhaps], wanted.hashes)]
        return list(zip(places[found].tolist(), hashes[found].tolist(), strict=True))

    def _stretches(self, inside: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """Beginnings and hashes of the stretches where all is inside."""
        edges = np.flatnonzero(np.diff(inside, prepend=False, append=False))
        begins, ends = edges[::2], edges[1::2]
        before = np.where(begins > 0, self._sums[begins - 1], np.uint64(0))
        return begins, (self._sums[ends - 1] - before) * self._inverses[begins]


@dataclass(frozen=True, eq=False)
class Wanted:
    """Pieces that are looked for.

    Attributes:
        hashes: theirs.
        last_bits: whether any of them ends in these bits, which rules out most others at once.
    """

    hashes: NDArray[np.uint64]
    last_bits: NDArray[np.bool_]

    @classmethod
    def of(cls, pieces: list[str]) -> Wanted:
        """Those of some texts."""
        hashes = np.array(sorted({hash_of(piece) for piece in pieces}), dtype=np.uint64)
        last_bits = np.zeros(2**14, dtype=np.bool_)
        last_bits[hashes & np.uint64(len(last_bits) - 1)] = True
        return cls(hashes, last_bits)


def hash_of(text: str) -> int:
    """The hash of a word or piece."""
    total, factor = 0, 1
    for char in text:
        total += (ord(char) + 1) * factor
        factor = factor * _FACTOR & _MASK
    return total & _MASK


@lru_cache(maxsize=1)
def _kinds_of_characters() -> NDArray[np.uint8]:
    kinds = np.full(_LAST_TOLD_APART + 1, _MARK, dtype=np.uint8)
    for code in range(_LAST_TOLD_APART):
        char = chr(code)
        if char.isspace():
            kinds[code] = _SPACE
        elif char.isalpha():
            is_latin = code < _FIRST_NOT_LATIN or 0x1E00 <= code < 0x1F00
            kinds[code] = _LATIN if is_latin else _OTHER_LETTER
    return kinds


@lru_cache(maxsize=32)
def _factors(bits: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Powers of the factor and of its inverse, 2^bits of each."""

    def powers(base: int) -> NDArray[np.uint64]:
        every = np.full(2**bits, base, dtype=np.uint64)
        every[0] = 1
        return np.cumprod(every, dtype=np.uint64)

    return powers(_FACTOR), powers(pow(_FACTOR, -1, 2**64))
