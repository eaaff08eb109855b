"""Converts what a user's verifier returns into a verdict.

A number or a bool is the score. A dict holds it under "score", along with an optional "answer", "error" and further
numbers by name.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from typing import Any

from megatron_fipo.system.nearest_name import nearest_name
from megatron_fipo.verifiers.verdict import Verdict, score_remedy

_ACCEPTED = (
    "A verifier judges one response and returns its score in [0, 1] (float, int or bool), a dict with 'score' and, if "
    "there is one, 'answer', or a Verdict"
)
_KEYS = ("score", "answer", "error")


class NoVerdictError(ValueError):
    """A verifier returned something that is no verdict; the message names it and the accepted forms."""


def as_verdict(returned: Any) -> Verdict:
    """Convert a returned value into a verdict.

    Raises:
        NoVerdictError: if it has another form, or if its score is outside [0, 1] or NaN.
    """
    if isinstance(returned, Verdict):
        return returned
    if isinstance(returned, Mapping):
        return _from_mapping(returned)
    score = number(returned)
    if score is None:
        raise NoVerdictError(f"returned {_described(returned)}. {_ACCEPTED}.{_hint(returned)}")
    return Verdict(_checked(score, returned))


def number(value: Any) -> float | None:
    """Convert a number, or a numpy or torch scalar without dimensions, to float; None for anything else."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (bool, int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    return None


def _from_mapping(returned: Mapping[Any, Any]) -> Verdict:
    error = returned.get("error")
    if error:
        return Verdict(0.0, _text(returned.get("answer")), str(error), _parts(returned))
    if "score" not in returned:
        names = [str(key) for key in returned]
        nearest = nearest_name("score", names)
        hint = f" Is {nearest!r} meant to be 'score'?" if nearest else ""
        raise NoVerdictError(f"returned a dict without 'score'; it has {', '.join(names) or 'nothing'}.{hint}")
    score = number(returned["score"])
    if score is None:
        raise NoVerdictError(f"returned a dict whose 'score' is {_described(returned['score'])}. {_ACCEPTED}.")
    return Verdict(_checked(score, returned["score"]), _text(returned.get("answer")), "", _parts(returned))


def _parts(returned: Mapping[Any, Any]) -> dict[str, float]:
    """The numbers in a returned dict under further keys; raises NoVerdictError for other values."""
    parts = {}
    for key, value in returned.items():
        if key in _KEYS:
            continue
        part = number(value)
        if part is None or not math.isfinite(part):
            raise NoVerdictError(
                f"returned a dict whose {str(key)!r} is {_described(value)}. Keys besides {', '.join(_KEYS)} are shown "
                "as metrics and hold finite numbers. Leave it out."
            )
        parts[str(key)] = part
    return parts


def _checked(score: float, returned: Any) -> float:
    if not 0.0 <= score <= 1.0:
        raise NoVerdictError(f"returned the score {returned!r:.80}; a score lies in [0, 1]. {score_remedy(score)}")
    return score


def _text(answer: Any) -> str:
    return "" if answer is None else str(answer)


def _described(value: Any) -> str:
    if value is None:
        return "None"
    article = "an" if type(value).__name__[0] in "aeiou" else "a"
    return f"{article} {type(value).__name__} ({_SHORT.repr(value):.80})"


_SHORT = reprlib.Repr()
"""Formats only the beginning of a value, which may be a gigabyte long or contain itself."""
_SHORT.maxstring = _SHORT.maxother = 80


def _hint(returned: Any) -> str:
    if returned is None:
        return " Does every path through it end in a return?"
    if isinstance(returned, (list, tuple)) or getattr(returned, "shape", ()) != ():
        return " It gets one response and not a batch: return one score, not a list."
    if isinstance(returned, str) and number_in(returned):
        return " Return the number, not its text."
    return ""


def number_in(text: str) -> bool:
    """Whether a text spells a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
