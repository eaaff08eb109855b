"""Seconds by the clock and by the processor of a training's steps, and of their rollouts. It imports no package."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class Stopwatch:
    """One rank's steps.

    A step lasts from its beginning to the next one's, so that nothing between them is left out. The last one has no
    end: what follows it is the end of a training, which saves the model.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []
        self._rollouts: list[float] = []
        self._counts: list[dict[str, int]] = []

    def begin_step(self) -> None:
        """The next step begins."""
        self._marks.append((time.perf_counter(), processor_seconds()))
        self._rollouts.append(0.0)
        self._counts.append({})

    @contextmanager
    def rollout(self) -> Iterator[None]:
        """A part of the step that generates or judges responses."""
        started = time.perf_counter()
        yield
        self._rollouts[-1] += time.perf_counter() - started

    def count(self, **numbers: int) -> None:
        """Add to what the step has done."""
        for name, number in numbers.items():
            self._counts[-1][name] = self._counts[-1].get(name, 0) + number

    def write(self, folder: Path, rank: int) -> None:
        """Write `rank-RANK.json`: an object for each step but the last."""
        steps = [
            {"step_s": after[0] - before[0], "cpu_s": after[1] - before[1], "rollout_s": rollout, **counts}
            for before, after, rollout, counts in zip(
                self._marks[:-1], self._marks[1:], self._rollouts[:-1], self._counts[:-1], strict=True
            )
        ]
        (folder / f"rank-{rank}.json").write_text(json.dumps(steps))


def processor_seconds() -> float:
    """Of this process and the processes that it has started and that still run, user's and system's."""
    return sum(_seconds_of(pid) for pid in [os.getpid(), *_children(os.getpid())])


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from _children(int(child))


def _seconds_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
