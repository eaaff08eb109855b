"""The line of a finished step: which numbers it shows, and in which columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console as RichConsole
from rich.text import Text

from megatron_fipo.config import Config
from megatron_fipo.console.terminal import MISSING

HEADER_EVERY_LINES = 25


@dataclass(frozen=True)
class Column:
    """One number of the step line."""

    heading: tuple[str, str]
    """Two lines of heading."""
    width: int
    metrics: tuple[str, ...]
    """Names of the metrics that the cell shows."""
    format: Callable[..., str]
    """Makes text of the metrics' values, all of which are finite."""
    style: str = ""
    rank: int = 0
    """Where the terminal is too narrow, the columns of the highest rank are left out first."""


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _compact(value: float) -> str:
    """Three or four digits that say something, also for 0.00042 and 123456."""
    if value != 0 and not 0.001 <= abs(value) < 1000:
        return f"{value:.1e}"
    return f"{value:.4f}" if abs(value) < 1 else f"{value:.2f}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}"


COLUMNS = (
    Column(("", "reward"), 7, ("reward/mean",), _signed, style="bold"),
    Column(("", "accuracy"), 8, ("rollout/accuracy/mean",), _percent, style="bold green", rank=1),
    Column(("response", "tokens"), 8, ("rollout/response_tokens/mean",), _count, rank=3),
    Column(("", "entropy"), 8, ("policy/entropy/mean",), _compact, rank=4),
    Column(("policy", "KL"), 8, ("policy/kl/mean",), _compact, rank=5),
    Column(("gradient", "norm"), 8, ("optim/grad_norm",), _compact, rank=6),
)
FUTURE_KL_COLUMNS = (
    Column(
        ("influence", "weight"),
        15,
        ("fipo/influence_weight/mean", "fipo/influence_weight/std"),
        lambda mean, std: f"{mean:.3f} ± {std:.3f}",
        style="magenta",
        rank=2,
    ),
    Column(("weights", "clipped"), 8, ("fipo/influence_weight/clipped_share",), _percent, style="magenta", rank=7),
)
TOKENS_PER_S = Column(("tokens", "per s"), 8, ("perf/tokens_per_s",), _count, style="dim", rank=8)


class StepLines:
    """Prints one line a step below headings that come back now and then."""

    def __init__(self, config: Config, rich: RichConsole) -> None:
        """
        Args:
            config: decides which columns there are.
            rich: where to print.
        """
        self._config, self._rich = config, rich
        self._num_lines = 0
        self._step_width = max(5, 2 * len(str(config.train.num_steps)) + 1)

    def print(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print the line of a step; what is missing or not finite shows as –."""
        columns = self._columns()
        if self._num_lines % HEADER_EVERY_LINES == 0:
            self._print_heading(columns)
        self._num_lines += 1
        label = f"{step}/{self._config.train.num_steps}"
        line = Text(f"{label:>{self._step_width}}", style="dim")
        for column in columns:
            values = [metrics.get(name, math.nan) for name in column.metrics]
            text = column.format(*values) if all(map(math.isfinite, values)) else MISSING
            line.append("  ")
            line.append(f"{text:>{column.width}}", style="not dim " + column.style if text != MISSING else "")
        self._rich.print(line, soft_wrap=True)

    def _print_heading(self, columns: list[Column]) -> None:
        self._rich.print()
        for row in (0, 1):
            cells = [f"{'' if row == 0 else 'step':>{self._step_width}}"]
            cells += [f"{column.heading[row]:>{column.width}}" for column in columns]
            self._rich.print(Text("  ".join(cells), style="dim" if row == 0 else "dim underline"), soft_wrap=True)

    def _columns(self) -> list[Column]:
        columns = list(COLUMNS)
        if self._config.objective.future_kl:
            columns += FUTURE_KL_COLUMNS
        columns.append(TOKENS_PER_S)
        while len(columns) > 1 and self._step_width + sum(column.width + 2 for column in columns) > self._rich.width:
            columns.remove(max(columns, key=lambda column: column.rank))
        return columns
