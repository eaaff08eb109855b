"""What a verifier is asked and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
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
        verifier: built-in name (`registry.BUILTIN_VERIFIERS`), dotted path "package.module:function", or the URL of a
            reward model.
        response_text: the response, without prompt and special tokens.
        reference: what the verifier compares with; must be picklable.
        finish_reason: stop, length or abort.
        prompt_text: the prompt as the model saw it; reward models read it.
    """

    verifier: str
    response_text: str
    reference: Any
    finish_reason: str = "stop"
    prompt_text: str = ""


class JobVerifier(ABC):
    """A verifier that needs more than a text and a reference: the prompt, its time limit, a check before the start.

    An instance in a module can be named like a function, as "package.module:instance".
    """

    def check_ready(self) -> None:  # noqa: B027 - most have nothing to check
        """Called once in every worker before its first job; what it raises (RuntimeError) stops the run."""

    @abstractmethod
    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """Judge one response. Whatever is raised becomes a verdict with an error.

        Args:
            job: the response.
            timeout_s: time after which the pool kills the worker.
        """


VerifierFunction: TypeAlias = Callable[[str, Any, str], Verdict]
"""(response_text, reference, finish_reason) -> Verdict. Pure; may raise, which the pool turns into an error verdict."""

Verifier: TypeAlias = VerifierFunction | JobVerifier
"""What judges: a function, or an object for what a function's arguments do not tell."""
