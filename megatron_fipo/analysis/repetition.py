"""How much of a response repeats itself: compressible share, n-grams that came before, and a loop at the end."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_fipo.analysis.words import Words

MIN_BYTES = 200
"""A shorter text is not compressed: the format's own bytes would be what is measured."""
ORDINARY = (
    *((200, 0.716), (500, 0.585), (1_000, 0.529), (2_000, 0.495), (5_000, 0.467)),
    *((10_000, 0.451), (20_000, 0.439), (40_000, 0.431), (100_000, 0.423)),
)
"""(bytes, compressed share of them by zlib at level 1) of ordinary text: the mean over pieces of the 1,319 questions of
GSM8K's test set, one behind the other. Pages of this project's documentation differ by 0.03 at most up to 20,000."""

WORD_SIZES = (4, 10)
CHARACTER_SIZE = 10
_CHARACTERS_PER_WORD = 20
"""More characters than this for each word, and a text is one without spaces."""

_LOOP_CHARACTERS = 60
_LOOP_PERIODS = 3
_NEEDLES = (12, 48, 192)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def compressible_share(text: str) -> float | None:
    """How much smaller zlib makes a text than ordinary text of its length, as a share; 0 where it does not.

    None for less than MIN_BYTES.
    """
    data = text.encode("utf-8", "surrogatepass")
    if len(data) < MIN_BYTES:
        return None
    share = len(zlib.compress(data, 1)) / len(data)
    return max(0.0, 1.0 - share / expected_share(len(data)))


def expected_share(num_bytes: int) -> float:
    """Compressed share of ordinary text of a length; beyond the table's last length it stays as there."""
    sizes, shares = zip(*ORDINARY, strict=True)
    return float(np.interp(math.log(num_bytes), [math.log(size) for size in sizes], shares))


def repeated_ngrams(words: Words) -> dict[str, float | None]:
    """Share of a text's n-grams that came before in it: of 4 and 10 words, or of 10 characters in text without spaces.

    By "word4", "word10" and "character10"; None where the text has none, or is of the other kind.

    Args:
        words: of the text in lower case.
    """
    names = [*(f"word{size}" for size in WORD_SIZES), f"character{CHARACTER_SIZE}"]
    shares: dict[str, float | None] = dict.fromkeys(names)
    hashes = words.word_hashes
    if len(words.codes) > _CHARACTERS_PER_WORD * len(hashes):
        if len(hashes):
            shares[f"character{CHARACTER_SIZE}"] = next(_shares(words.without_spaces(), (CHARACTER_SIZE,)))
        return shares
    for size, share in zip(WORD_SIZES, _shares(hashes, WORD_SIZES), strict=True):
        shares[f"word{size}"] = share
    return shares


def _shares(codes: NDArray[np.uint64], sizes: tuple[int, ...]) -> Iterator[float | None]:
    """Share of the n-grams that came before, for each n; n-grams are told apart by 64 bits."""
    sums, size = codes.copy(), 1
    for wanted in sizes:
        while size < wanted and len(sums) > 1:  # from the n-grams of one size to those of the next one
            sums = sums[:-1] * _MULTIPLIER + codes[size:]
            size += 1
        if size < wanted or not len(sums):
            yield None
            continue
        ordered = np.sort(sums)
        yield float(np.count_nonzero(ordered[1:] == ordered[:-1])) / len(ordered)


@dataclass(frozen=True)
class Loop:
    """The end of a text that repeats one stretch.

    Attributes:
        period: characters of the stretch.
        length: characters of the end that repeats it, with its first occurrence.
    """

    period: int
    length: int


def loop_at_end(text: str) -> Loop | None:
    """The longest end of a text that repeats one stretch at least three times; None where there is none.

    It has at least 60 characters, and may end within the stretch. Blanks at the very end do not count.
    """
    end = text.rstrip()
    best = None
    for size in _NEEDLES:
        if len(end) <= size:
            break
        former = end.rfind(end[-size:], 0, len(end) - 1)
        if former < 0:
            break  # a longer end is not found earlier, either
        period = len(end) - size - former
        length = period + _length_of_match(end, period)
        # The last stretch may lack the blank behind it.
        if (
            length + 1 >= _LOOP_PERIODS * period
            and length >= _LOOP_CHARACTERS
            and (best is None or length > best.length)
        ):
            best = Loop(period, length)
    return best


def _length_of_match(text: str, period: int) -> int:
    """How many characters at the end of a text are the same as those one period before them."""
    whole = len(text)

    def matches(length: int) -> bool:
        return text[whole - length :] == text[whole - period - length : whole - period]

    most = whole - period
    good, step = 0, min(max(period, 1), most)
    while good + step <= most and matches(good + step):
        good, step = good + step, step * 2
    bad = min(good + step, most + 1)
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if matches(middle) else (good, middle)
    return good
