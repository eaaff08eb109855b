"""The table of an evaluation's scores, alone or beside those of an earlier one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich import box
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_fipo.console.terminal import MISSING


def scores_table(title: str, before: Mapping[str, float], after: Mapping[str, float] | None = None) -> Padding:
    """Scores by name, such as {"held_out/avg@4": 0.31}; with `after`, both and the change."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column(Text(title, style="not dim bold"))
    for heading in ["value"] if after is None else ["before", "after", "change"]:
        table.add_column(heading, justify="right", min_width=8)
    for name in dict.fromkeys([*before, *(after or {})]):
        old = before.get(name, math.nan)
        if after is None:
            table.add_row(name, _number(old))
            continue
        new = after.get(name, math.nan)
        table.add_row(
            name,
            _number(old),
            Text(_number(new), style="bold"),
            Text(_number(new - old, sign=True), style="bold cyan"),
        )
    return Padding(table, (0, 0, 0, 2), expand=False)


def _number(value: float, sign: bool = False) -> str:
    if not math.isfinite(value):
        return MISSING
    return f"{value:{'+' if sign else ''},.{3 if abs(value) < 10 else 1}f}"
