"""Tables of texts for people, as the trackers show them."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

Cell: TypeAlias = str | int | float | bool | None

MAX_CHARACTERS = 2_000
"""A longer text loses its middle: trackers keep every step's table, and load all of them to show one."""


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def shortened(self) -> Table:
        """The table with the middles of its long texts left out."""
        return Table(self.columns, [[_shortened(cell) for cell in row] for row in self.rows])

    def markdown(self) -> str:
        """The table for a reader of Markdown that takes HTML's entities. No text in it is taken for either."""
        lines = [self.columns, ["---"] * len(self.columns), *([_literal(cell) for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shortened(cell: Cell) -> Cell:
    if not isinstance(cell, str) or len(cell) <= MAX_CHARACTERS:
        return cell
    half = MAX_CHARACTERS // 2
    return f"{cell[:half]} … {len(cell) - 2 * half} characters … {cell[-half:]}"


def _literal(cell: Cell) -> str:
    """A cell in one line, whose text stands for itself."""
    if isinstance(cell, float):
        return f"{cell:.4g}"
    return "".join(_literal_character(character) for character in ("" if cell is None else str(cell)))


def _literal_character(character: str) -> str:
    if character == "\n":
        return "<br>"
    if character in string.punctuation:
        return f"&#{ord(character)};"
    return character if character.isprintable() else _literal(json.dumps(character)[1:-1])
