r"""The answers that a response names on its way: \boxed{…}, "the answer is …", "#### …", "Antwort: …", 答案：…"""

from __future__ import annotations

import re
from dataclasses import dataclass

_MARKS = ("\\boxed", "####", "answer", "result is", "antwort", "答案")
_MARK = re.compile(
    r"(?:\\boxed\s{0,2}\{|#{4,6}|(?:answer|result|antwort|答案)[*_]{0,2}\s{0,3}"
    r"(?:[:：=]|(?:is|ist|lautet|should be|would be|must be|then is|becomes|是|为|应该是|应为)(?![a-z])[:：]?))"
    r"[*_]{0,2}[\s$]{0,4}"
)
_MAX_MARKS = 400
"""A response that names more answers than this is a loop; the first ones and the last one tell of it."""
_VALUE = 120
"""Characters that are read behind a mark."""
_NUMBER = re.compile(r"[-+]?[0-9][0-9,]{0,40}(?:\.[0-9]{1,40})?(?:/[0-9]{1,20})?")
_WORDS = re.compile(r"[^\n.;。；，,]{1,60}")


@dataclass(frozen=True, eq=False)
class Candidate:
    """An answer that a response names, and where."""

    place: int
    value: str


def answers_in(lower: str) -> list[Candidate]:
    """The answers in order.

    Args:
        lower: the response, lowered.
    """
    places = set()
    for mark in _MARKS:
        at = lower.find(mark)
        for _ in range(_MAX_MARKS):
            if at < 0:
                break
            places.add(at)
            at = lower.find(mark, at + len(mark))
    found = []
    for place in sorted(places):
        match = _MARK.match(lower, place, place + 48)
        value = _value(lower[match.end() : match.end() + _VALUE], match[0].startswith("\\")) if match else ""
        if value:
            found.append(Candidate(place, value))
    return found


def _value(behind: str, is_boxed: bool) -> str:
    if is_boxed:
        return _normal(_within_braces(behind))
    behind = behind.lstrip("*_$ \\(")
    match = _NUMBER.match(behind) or _WORDS.match(behind)
    return _normal(match[0]) if match else ""


def _within_braces(behind: str) -> str:
    depth = 1
    for place, char in enumerate(behind):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return behind[:place]
    return ""


def _normal(value: str) -> str:
    value = value.strip().strip("*_$").strip()
    value = value.removeprefix("\\(").removesuffix("\\)").strip().rstrip(".")
    return " ".join(value.split())


def is_same(one: str, other: str) -> bool:
    """Whether two answers are the same: as numbers where both are, else as texts without regard to case."""
    one, other = _normal(one.lower()), _normal(other.lower())
    return one == other or (_as_number(one) == _as_number(other) is not None)


def _as_number(text: str) -> float | None:
    match = _NUMBER.fullmatch(text.lstrip("$").replace(" ", ""))
    if match is None or len(match[0]) > 24:
        return None
    number, _, divisor = match[0].replace(",", "").partition("/")
    if not divisor:
        return float(number)
    return float(number) / int(divisor) if int(divisor) else None
