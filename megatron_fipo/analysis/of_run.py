"""Analyses the responses of a run's folder: values by step, source and place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from megatron_fipo.analysis.measures import Totals, add_response
from megatron_fipo.analysis.names import NAMES
from megatron_fipo.analysis.responses import Batch, State, batches_of, read_batch

BYTES_OF_ONE_PROCESS = 32 * 2**20
"""Folders with more to read are read by several processes."""


@dataclass(frozen=True)
class Point:
    """The responses of one source at one step.

    Attributes:
        step: how many steps the policy that wrote them had behind it.
        source: of their prompts.
        where: evaluation or training.
        num_responses: how many there are.
        values: means by name; a name of which no response tells anything is missing.
        marks: how often each pattern was found, by its id.
    """

    step: int
    source: str
    where: str
    num_responses: int
    values: Mapping[str, float]
    marks: Mapping[str, int]


@dataclass(frozen=True)
class Analysis:
    """What was found in a run's folder.

    Attributes:
        points: by place, source and step, in this order.
        batches: the points of each batch of files with the files' state, from which `analyse_run` goes on.
    """

    points: Sequence[Point]
    batches: Mapping[Batch, tuple[State, Sequence[Point]]] = field(default_factory=dict, repr=False)

    def to_plain(self) -> dict[str, Any]:
        """The same in JSON's types: {"points": […], "names": {name: {"title", "caption"}}}; None where none is."""
        names = [name for name in NAMES if any(name in point.values for point in self.points)]
        return {
            "points": [
                {
                    "step": point.step,
                    "source": point.source,
                    "where": point.where,
                    "num_responses": point.num_responses,
                    "values": {name: point.values.get(name) for name in names},
                    "marks": dict(sorted(point.marks.items())),
                }
                for point in self.points
            ],
            "names": {name: {"title": NAMES[name].title, "caption": NAMES[name].caption} for name in names},
        }


def analyse_run(folder: str | Path, earlier: Analysis | None = None) -> Analysis:
    """Analyse all responses that a run's folder holds; no points where it holds none.

    The files of one step are in memory at a time, in each process.

    Args:
        folder: the run's, which may go on meanwhile.
        earlier: an analysis of the same folder; files that are as they were are not read again.

    Raises:
        ValueError: if it is no folder, or a file is damaged.
    """
    run = Path(folder)
    known = earlier.batches if earlier is not None else {}
    found: dict[Batch, tuple[State, Sequence[Point]]] = {}
    new: list[tuple[Batch, State, int]] = []
    for batch in batches_of(run):
        try:
            state = batch.state
        except FileNotFoundError:  # a run that is resumed has deleted it: it is made again
            continue
        if batch in known and known[batch][0] == state:
            found[batch] = known[batch]
        else:
            new.append((batch, state, sum(size for _, size, _ in state)))
    for (batch, state, _), points in zip(new, _analysed(run, new), strict=True):
        found[batch] = state, points
    points = sorted(
        (point for _, of_batch in found.values() for point in of_batch),
        key=lambda point: (point.where, point.source, point.step),
    )
    return Analysis(points, found)


def _analysed(run: Path, batches: Sequence[tuple[Batch, State, int]]) -> Iterator[Sequence[Point]]:
    """The points of each batch, in order."""
    processes = min(len(os.sched_getaffinity(0)), len(batches))
    if processes < 2 or sum(size for _, _, size in batches) < BYTES_OF_ONE_PROCESS:
        yield from (analyse_batch(run, batch) for batch, _, _ in batches)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(analyse_batch, [run] * len(batches), [batch for batch, _, _ in batches])


def analyse_batch(run: Path, batch: Batch) -> list[Point]:
    """The points of a batch, a source each.

    Raises:
        ValueError: if a file is damaged.
    """
    by_source: dict[str, Totals] = {}
    for response in read_batch(run, batch):
        add_response(by_source.setdefault(response.source, Totals()), response)
    return [
        Point(batch.step, source, batch.where, totals.num_responses, totals.means(), dict(totals.marks))
        for source, totals in by_source.items()
    ]


def spans(points: Iterable[Point]) -> Iterator[list[Point]]:
    """The points of each place and source, by step."""
    found: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        found.setdefault((point.where, point.source), []).append(point)
    yield from found.values()
