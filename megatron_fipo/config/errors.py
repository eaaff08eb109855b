"""The error of a configuration that cannot run, and the wording of a wrong choice."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot run. The message names key, value, rule and remedy, one line for each problem."""

    @classmethod
    def of(cls, problems: Sequence[str], where: str = "the configuration") -> ConfigError:
        """One problem stands alone, several make a list."""
        if len(problems) == 1:
            return cls(problems[0])
        return cls("\n  - ".join([f"{len(problems)} problems in {where}:", *problems]))


def choice_problem(key: str, value: object, choices: Sequence[str]) -> str:
    """Say that `value` is none of `choices`, and which of them is nearest."""
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{key}={value}: must be one of {', '.join(choices)}.{hint}"
