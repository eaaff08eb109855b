"""Responses with their prompts and verdicts, as they are shown to a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megatron_fipo.console.terminal import open_terminal, printable

MAX_LINES = 8
"""A longer text loses its middle, unless it is asked for in full."""
MAX_LINE_CHARACTERS = 600
"""A longer line loses its middle likewise."""


@dataclass(frozen=True)
class ShownSample:
    """A response to show."""

    prompt: str
    response: str
    reference: str
    """The right answer."""
    answer: str
    """What the verifier took the response to answer; empty if nothing."""
    accuracy: float
    """The verifier's score; 1 is correct."""
    num_tokens: int
    truncated: bool = False
    note: str = ""
    """What else there is to say of it, in a line."""


def print_samples(title: str, items: Sequence[ShownSample], *, full: bool = False, file: IO[str] | None = None) -> None:
    """Show responses outside a run, in the way of `Console.samples`.

    Args:
        full: whether every line of them is shown, whatever their length.
        file: where to print; standard output by default.
    """
    print_samples_on(open_terminal(file), title, items, full=full)


def print_samples_on(rich: RichConsole, title: str, items: Sequence[ShownSample], *, full: bool) -> None:
    """Show responses on a terminal that is open."""
    rich.print()
    rich.print(Rule(Text(printable(title), style="bold"), align="left", style="dim"))
    for item in items:
        rich.print(_sample(item, full))


def _sample(item: ShownSample, full: bool) -> Padding:
    correct = item.accuracy >= 1
    mark = Text("✓ correct" if correct else "✗ wrong", style="bold green" if correct else "bold red")
    score = f" (score {item.accuracy:.2f})" if 0 < item.accuracy < 1 else ""
    cut = ", cut at the length limit" if item.truncated else ""
    answer = printable(item.answer) or "nothing"
    verdict = Text.assemble(
        mark,
        (f"{score}  answered {answer}, expected {printable(item.reference)}; {item.num_tokens} tokens{cut}", "dim"),
    )
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row("prompt", Text(_shorten(item.prompt, full)))
    grid.add_row("response", Text(_shorten(item.response, full), style="cyan"))
    notes = [Text(printable(item.note), style="dim")] if item.note else []
    return Padding(Group(grid, verdict, *notes), (0, 0, 1, 2), expand=False)


def _shorten(text: str, full: bool) -> str:
    """Leave out the middle of a long text: the end of a response holds its answer. In full, nothing is left out."""
    lines = printable(text).strip("\n").split("\n")
    if full:
        return "\n".join(lines)
    if len(lines) > MAX_LINES:
        head = MAX_LINES // 2
        tail = MAX_LINES - head - 1
        lines = [*lines[:head], f"… {len(lines) - head - tail} lines …", *lines[-tail:]]
    half = MAX_LINE_CHARACTERS // 2
    return "\n".join(line if len(line) <= MAX_LINE_CHARACTERS else f"{line[:half]} … {line[-half:]}" for line in lines)
