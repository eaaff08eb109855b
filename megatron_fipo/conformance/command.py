"""`megatron-fipo conformance`: compares another implementation of the loss with recordings of FIPO's public code."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_fipo.conformance.comparison import Comparison

PIPE_WIDTH = 100
"""Columns of output that goes to no terminal."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Call an implementation of the loss on recorded inputs of FIPO's public code and compare loss, gradient and "
        "what else it returns with the recorded outputs. Leaves with 0 if all agree, 1 if not, 2 if it cannot be "
        "called. docs/library.md says what the function takes and returns."
    )
    parser.add_argument(
        "implementation",
        metavar="MODULE:FUNCTION",
        help="such as my_module:loss, in the current folder or installed; megatron_fipo:padded_policy_loss is this one",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare, and print the table.

    Returns:
        0, or 1 if a difference is above its bound.

    Raises:
        CannotUseError: if the implementation cannot be loaded, raises, or returns what cannot be compared.
    """
    from rich.console import Console

    from megatron_fipo.conformance import implementation, recording
    from megatron_fipo.conformance.comparison import QUANTITIES, compare

    name = arguments.implementation
    loss = implementation.load(name)
    comparisons = []
    for path in recording.FILES:
        recorded = recording.load(path)
        comparisons += compare(recorded, implementation.results(name, loss, recorded))
    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    _print_table(comparisons, console)
    missing = [quantity for quantity in QUANTITIES if quantity not in {row.quantity for row in comparisons}]
    if missing:
        console.print(f"Not returned, and so not compared: {', '.join(missing)}.", highlight=False, markup=False)
    failing = {row.case: None for row in comparisons if not row.passes}
    num_cases = len(recording.FILES)
    verdict = (
        f"differs in {len(failing)} of {num_cases} recordings: {', '.join(failing)}."
        if failing
        else f"agrees with all {num_cases} recordings."
    )
    console.print(f"{name} {verdict}", highlight=False, markup=False)
    return 1 if failing else 0


def _print_table(comparisons: Sequence[Comparison], console: Console) -> None:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for column in ("case", "compared"):
        table.add_column(column)
    for column in ("largest difference", "bound", ""):
        table.add_column(column, justify="right")
    last_case = ""
    for row in comparisons:
        case = row.case if row.case != last_case else ""
        style = "" if row.passes else "bold red"
        verdict = "pass" if row.passes else "FAIL"
        table.add_row(case, row.quantity, f"{row.difference:.2g}", f"{row.bound:g}", verdict, style=style)
        last_case = row.case
    console.print(table)
