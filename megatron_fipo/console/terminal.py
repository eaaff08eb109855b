"""A terminal, or the file that stands for one, and text that is safe to show there."""

from __future__ import annotations

from io import TextIOWrapper
from typing import IO

from rich.console import Console as RichConsole

from megatron_fipo.config import without_secrets

MISSING = "–"
"""Stands for a number that there is none of."""
PIPE_WIDTH = 130
"""Columns of output that goes to no terminal."""


def open_terminal(file: IO[str] | None, width: int | None = None, *, enabled: bool = True) -> RichConsole:
    """Something to print on, as wide as the terminal or as a log wants it.

    Args:
        file: where to print; standard output by default.
        width: columns; by default the terminal's, or `PIPE_WIDTH` where there is none.
        enabled: false silences it altogether.
    """
    rich = RichConsole(file=file, width=width, highlight=False, quiet=not enabled)
    if not is_live(rich) and width is None:
        rich.width = PIPE_WIDTH
    if enabled and isinstance(rich.file, TextIOWrapper):
        rich.file.reconfigure(errors="replace")  # a log in ASCII must not end the run over a dash
    return rich


def is_live(rich: RichConsole) -> bool:
    """Whether what was printed can be drawn over, as progress bars are. Colours may be forced into a file; bars not."""
    return rich.is_interactive and rich.file.isatty()


def printable(text: str) -> str:
    """Escape control characters, so that no text can move the cursor or colour the terminal; secrets as references."""
    text = without_secrets(text).replace("\r\n", "\n").expandtabs(4)
    return "".join(char if char == "\n" or char.isprintable() else repr(char)[1:-1] for char in text)
