"""One line of the tables: what another trainer calls a key of ours."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForeignKey:
    """A key of another trainer."""

    name: str
    """The key as that trainer writes it; "critic.*" stands for all keys below critic."""
    keys: tuple[str, ...]
    """Our keys, dotted; <name> stands for a data source's name. Empty where nothing corresponds."""
    note: str
    """Where the meaning differs, or what there is instead; a sentence, or empty."""


Topics = dict[str, tuple[ForeignKey, ...]]
"""Keys by topic, in the order of the page."""


def key(name: str, ours: str = "", note: str = "") -> ForeignKey:
    """An entry; several keys of ours are separated by blanks."""
    return ForeignKey(name, tuple(ours.split()), note)


TAKE_TURNS = "Generation and training take turns here."
"""Where the other trainer generates while it trains."""
