"""What is wrong with a configuration, as data, and the error that lists it.

A `Problem` has the key, its value, the rule that it breaks and the remedy apart from each other; what a user reads is
composed here and nowhere else.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from megatron_fipo.system.nearest_name import nearest_name

LONGEST_SHOWN = 200
"""Characters of a value that a message shows."""


class _NotShown:
    def __repr__(self) -> str:
        return "NOT_SHOWN"


NOT_SHOWN: Final = _NotShown()
"""Stands in for a value that a message must not repeat, or that the rule names itself."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a configuration.

    Attributes:
        key: dotted, as the user writes it.
        value: what it is; NOT_SHOWN leaves it out of the sentence.
        rule: the rule that the value breaks, to follow the colon; without a full stop at its end.
        remedy: what to do, a sentence or several; the last one's full stop may be left out.
    """

    key: str
    value: Any
    rule: str
    remedy: str = ""

    def __str__(self) -> str:
        if self.value is NOT_SHOWN:
            given = self.key
        elif isinstance(self.value, (str, list, dict)) and not self.value:
            given = f"{self.key} is empty"
        else:
            given = f"{self.key}={shown_value(self.value)}"
        if not self.remedy:
            return f"{given}: {self.rule}."
        return f"{given}: {self.rule}. {self.remedy}{'' if self.remedy.endswith(('?', '.')) else '.'}"


class ConfigError(ValueError):
    """A configuration that cannot run. The message names key, value, rule and remedy, one line for each problem.

    Attributes:
        problems: the same as data; empty where the error was raised with a text of its own.
    """

    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, problems: Sequence[Problem | str], where: str = "the configuration") -> ConfigError:
        """An error whose message is the one problem, or a list of several."""
        texts = [str(problem) for problem in problems]
        error = cls(texts[0] if len(texts) == 1 else "\n  - ".join([f"{len(texts)} problems in {where}:", *texts]))
        error.problems = tuple(problem for problem in problems if isinstance(problem, Problem))
        return error


def shown_value(value: Any) -> str:
    """A value as messages show it: null, true and false as in YAML, unprintable characters escaped, not too long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):  # Cs: lone surrogates
        text = repr(text)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}…"


def choice_problem(key: str, value: object, choices: Sequence[str]) -> Problem:
    """Say that `value` is none of `choices`, and which of them is nearest."""
    nearest = nearest_name(str(value), choices)
    return Problem(key, value, f"must be one of {', '.join(choices)}", f"Did you mean {nearest}?" if nearest else "")
