"""What a figure is, and which of the table's figures the runs have metrics for.

A name with a part of the run's own, such as a source's, is found among the run's metrics. In the table that part stands
in angle brackets, as in docs/metrics.md. Where the title has such a part there is a figure for each, otherwise a line.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

LINE, LOW, HIGH = "line", "low", "high"


@dataclass(frozen=True)
class Section:
    """A group of figures on the page."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Line:
    """A curve; low and high bound a band around it."""

    metric: str
    label: str
    role: str = LINE


@dataclass(frozen=True)
class Figure:
    """A figure.

    Attributes:
        id: names it on the page; the metric's own part follows where there are several of its kind.
        caption: what it shows, and what a healthy run shows.
        unit: of the vertical axis; empty for plain numbers.
        log: whether that axis is logarithmic.
        is_share: whether all its values are shares, from 0 to 1; intervals are cut there.
    """

    id: str
    section: str
    title: str
    caption: str
    lines: tuple[Line, ...]
    unit: str = ""
    log: bool = False
    is_share: bool = False


def lines_of(base: str, *stats: str | tuple[str, str]) -> tuple[Line, ...]:
    """Lines of metrics that share a base; a pair gives a label of its own."""
    pairs = [(one, one) if isinstance(one, str) else one for one in stats]
    return tuple(Line(f"{base}/{stat}", label.replace("_", " ")) for stat, label in pairs)


def line_in_band(base: str, line: str, low: str, high: str) -> tuple[Line, ...]:
    """A line within a band."""
    return (
        Line(f"{base}/{line}", line),
        Line(f"{base}/{low}", low, LOW),
        Line(f"{base}/{high}", high, HIGH),
    )


_PART = re.compile(r"<(\w+)>")
_REST = "rest"
_PIECES = {piece: rf"(?P<{piece}>[0-9.]+)" for piece in ("k", "low", "high")} | {_REST: rf"(?P<{_REST}>.+)"}
"""Parts that are numbers, and what follows a name; all others are words without a slash."""
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def found_figures(table: Iterable[Figure], names: Collection[str]) -> list[Figure]:
    """The figures that there are metrics for, with the lines that there are metrics for.

    Args:
        table: figures, whose names may hold parts in angle brackets.
        names: the metrics that the runs have.
    """
    return [found for figure in table for found in _found(figure, names)]


def plain(item: Section | Figure) -> dict[str, Any]:
    """As a JSON object."""
    return asdict(item)


def _found(figure: Figure, names: Collection[str]) -> Iterator[Figure]:
    if not _PART.search(figure.title):
        lines = [line for pattern in figure.lines for line in _found_lines(pattern, names)]
        if any(line.role == LINE and line.metric in names for line in lines):
            yield replace(figure, lines=tuple(lines))
        return
    for number, parts in enumerate(_bindings(figure.lines[0].metric, names)):
        lines = [_filled_line(line, parts) for line in figure.lines]
        yield replace(
            figure,
            id=figure.id if number == 0 else f"{figure.id}-{number + 1}",
            title=_filled(figure.title, parts),
            lines=tuple(line for line in lines if line.metric in names),
        )


def _found_lines(pattern: Line, names: Collection[str]) -> list[Line]:
    """Lines of a pattern. One whose name lacks this metric but has others keeps its place, without values: the place
    gives the colour, and a setting's colour is the same in every figure."""
    if not _PART.search(pattern.metric):
        return [pattern] if pattern.metric in names else []
    lines = [_filled_line(pattern, parts) for parts in _bindings(_named_part(pattern.metric), names)]
    return lines if any(line.metric in names for line in lines) else []


def _named_part(metric: str) -> str:
    """The name up to what is named by a part, with all that follows: shadow/<name>/… of any metric."""
    stem = re.match(r"(?:[^<>]*/)?<[^<>/]+>/", metric)
    return f"{stem[0]}<rest>" if stem else metric


def _bindings(metric: str, names: Collection[str]) -> list[dict[str, str]]:
    """What the parts of a name are in each of the names that fit, each once: by name, with numbers in it by size."""
    pieces = _PART.split(metric)
    pattern = "".join(
        _PIECES.get(piece, rf"(?P<{piece}>[^/]+)") if index % 2 else re.escape(piece)
        for index, piece in enumerate(pieces)
    )
    found = [match.groupdict() for name in names if (match := re.fullmatch(pattern, name))]
    unique = {tuple(value for key, value in parts.items() if key != _REST): parts for parts in found}
    return [unique[key] for key in sorted(unique, key=lambda key: [_by_size(value) for value in key])]


def _by_size(text: str) -> list[tuple[float, str]]:
    """Sorts texts by their words and numbers: tau_8 before tau_128."""
    return [(float(piece), "") if index % 2 else (0.0, piece) for index, piece in enumerate(_NUMBER.split(text))]


def _filled_line(line: Line, parts: Mapping[str, str]) -> Line:
    return replace(line, metric=_filled(line.metric, parts), label=_filled(line.label, parts))


def _filled(text: str, parts: Mapping[str, str]) -> str:
    return _PART.sub(lambda match: parts[match[1]], text)
