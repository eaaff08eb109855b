"""How far a phase of a step is: a live bar on a terminal, and now and then a line in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PIPE_PROGRESS_EVERY_S = 30.0


class PhaseProgress(Protocol):
    """Takes note of what is done."""

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done."""
        ...


class SilentProgress:
    """Shows nothing, for ranks that do not print."""

    def advance(self, count: int = 1) -> None:
        """Do nothing."""


class PipeProgress:
    """Says now and then how far a long phase is, and nothing about a short one."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float], label: str, total: int, unit: str
    ) -> None:
        """Start counting.

        Args:
            say: prints a line.
            clock: tells the time in seconds.
            label: what is being done.
            total: how many there will be.
            unit: what is counted.
        """
        self._say, self._clock, self._label, self._total, self._unit = say, clock, label, total, unit
        self._done = 0
        self._start = self._last = clock()

    def advance(self, count: int = 1) -> None:
        """Count `count` more as done, and say so if nothing was said for half a minute."""
        self._done += count
        now = self._clock()
        if now - self._last >= PIPE_PROGRESS_EVERY_S:
            self._last = now
            self._say(f"{self._label}: {self._done}/{self._total} {self._unit}, {now - self._start:.0f} s")


class _Bar:
    """One bar on the terminal."""

    def __init__(self, bars: Progress, label: str, total: int) -> None:
        self._bars = bars
        self._task = bars.add_task(label, total=total)

    def advance(self, count: int = 1) -> None:
        self._bars.advance(self._task, count)


@contextmanager
def live_bar(rich: RichConsole, label: str, total: int, unit: str) -> Iterator[PhaseProgress]:
    """A bar that is drawn over as the phase goes on, and vanishes when it is over."""
    columns = (
        TextColumn("  [cyan]{task.description:<18}"),
        BarColumn(bar_width=32),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("[dim]left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=rich, transient=True, refresh_per_second=5) as bars:
        yield _Bar(bars, label, total)
