"""Suggests the name that a mistyped one probably stands for."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

ALIKE = 0.5
"""Least similarity of a name that is suggested, from 0 to 1 as `difflib.get_close_matches` computes it."""


def nearest_name(name: str, known: Iterable[str], similarity: float = ALIKE) -> str | None:
    """The known name that is most like this one; None where none is like it.

    Args:
        similarity: the least that counts; more than `ALIKE` where the name may well be meant as it stands.
    """
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=similarity)
    return nearest[0] if nearest else None


def did_you_mean(name: str, known: Iterable[str], *, shown_as: str = "{}", similarity: float = ALIKE) -> str:
    """A sentence to append to a message, " Did you mean 'x'?"; empty where no known name is like this one.

    Args:
        shown_as: how the suggestion is written, such as "judges:{}".
        similarity: the least that counts, see `nearest_name`.
    """
    nearest = nearest_name(name, known, similarity)
    return f" Did you mean {shown_as.format(nearest)!r}?" if nearest is not None else ""
