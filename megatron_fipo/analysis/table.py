"""The values of an analysis in the terminal: first, last and the change, for each place and source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

from rich import box
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from megatron_fipo.analysis.names import NAMES
from megatron_fipo.analysis.of_run import Analysis, Point, spans
from megatron_fipo.console.terminal import MISSING, open_terminal, printable


def print_analysis(run: str, analysis: Analysis, file: IO[str] | None = None) -> None:
    """Print a table for each place and source. A value that is 0 throughout has no line.

    Args:
        run: the run's folder, for the heading.
        file: where to print; standard output by default.
    """
    rich = open_terminal(file)
    rich.print()
    rich.print(Rule(Text(printable(run), style="bold"), align="left", style="dim"))
    for points in spans(analysis.points):
        rich.print()
        rich.print(Padding(_table(points), (0, 0, 0, 2), expand=False))


def _table(points: Sequence[Point]) -> Table:
    first, last = points[0], points[-1]
    only_one = len(points) == 1
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column(Text(f"{printable(first.source)}, {first.where}", style="not dim bold"))
    steps = [first] if only_one else [first, last]
    for point in steps:
        table.add_column(Text(f"step {point.step:,}"), justify="right", min_width=9)
    if not only_one:
        table.add_column("change", justify="right", min_width=9)
    table.add_row("responses", *(Text(f"{point.num_responses:,}", style="dim") for point in steps))
    for name, meaning in NAMES.items():
        if not any(point.values.get(name) for point in points):
            continue
        values = [point.values.get(name) for point in steps]
        cells: list[str | Text] = [_number(value) for value in values]
        if not only_one:
            known = [value for value in values if value is not None]
            cells.append(
                Text(_number(known[1] - known[0], sign=True) if len(known) == 2 else MISSING, style="bold cyan")
            )
        table.add_row(meaning.title, *cells)
    if len(points) > 2:
        table.caption = Text(f"{len(points):,} steps have responses; --json writes all of them", style="dim")
        table.caption_justify = "left"
    return table


def _number(value: float | None, sign: bool = False) -> str:
    if value is None:
        return MISSING
    return f"{value:{'+' if sign else ''},.{3 if abs(value) < 10 else 1}f}"
