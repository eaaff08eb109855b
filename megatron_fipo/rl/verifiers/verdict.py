"""What a verifier is asked and what it answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one response.

    Attributes:
        score: in [0, 1]; 1 is correct. Some reasoning-gym tasks give partial credit in between; a reward that knows
            only right and wrong goes by `correct`.
        answer: the final answer as it was extracted, empty if the response has none; majority votes count these.
        error: why the response could not be judged; empty if it was. A verdict with an error says nothing about the
            response: score is 0 and means "unknown".

    Raises:
        ValueError: for a score outside [0, 1], NaN included.
    """

    score: float
    answer: str = ""
    error: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(f"a verdict's score lies in [0, 1], got {self.score}")

    @property
    def correct(self) -> bool:
        """Whether the answer was accepted in full."""
        return self.score == 1.0


@dataclass(frozen=True)
class VerifierJob:
    """One response to judge.

    Attributes:
        verifier: built-in name (`registry.BUILTIN_VERIFIERS`) or dotted path "package.module:function".
        response_text: the response, without prompt and special tokens.
        reference: what the verifier compares with; must be picklable.
        finish_reason: stop, length or abort.
    """

    verifier: str
    response_text: str
    reference: Any
    finish_reason: str = "stop"


Verifier: TypeAlias = Callable[[str, Any, str], Verdict]
"""(response_text, reference, finish_reason) -> Verdict. Pure; may raise, which the pool turns into an error verdict."""
