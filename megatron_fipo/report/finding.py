"""One finding about a run, in words, with the numbers that it rests on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

GOOD, NOTE, WARNING, BAD = "good", "note", "warning", "bad"
LEVELS = (BAD, WARNING, GOOD, NOTE)
"""In the order in which a page shows them."""


@dataclass(frozen=True)
class Finding:
    """A finding.

    Attributes:
        level: how good or bad it is.
        title: in a few words.
        text: a sentence or two with the numbers.
        metrics: the metrics that say so.
    """

    level: str
    title: str
    text: str
    metrics: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


def number(value: float) -> str:
    """Three digits that say something, also of 0.00042 and 123456."""
    if value != 0 and not 0.001 <= abs(value) < 10_000:
        return f"{value:.1e}"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share in per cent, with a digit behind the point where it is small."""
    return f"{100 * value:.2g} %" if abs(value) < 0.01 else f"{100 * value:.3g} %"
