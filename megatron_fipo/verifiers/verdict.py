"""The question to a verifier, and its answer."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

RAISED = "raised"
"""`Verdict.fault` of a verifier that raised an exception."""

NO_VERDICT = "no verdict"
"""`Verdict.fault` of a verifier that returned something that is no verdict, or that could not be loaded at all."""


_SEPARATOR = " + "


def combined_name(weights: Mapping[str, float]) -> str:
    """One name for several verifiers with their weights; a single verifier's own."""
    if len(weights) == 1:
        return next(iter(weights))
    return _SEPARATOR.join(f"{float(weight)!r}*{name}" for name, weight in weights.items())


def split_name(name: str) -> dict[str, float]:
    """Verifiers and weights of a name that `combined_name` gave; {name: 1.0} for any other."""
    parts = name.split(_SEPARATOR)
    if len(parts) == 1:
        return {name: 1.0}
    weights = {}
    for part in parts:
        weight, _, verifier = part.partition("*")
        weights[verifier] = float(weight)
    return weights


def metric_part(name: str) -> str:
    """A part's name as one step of a metric's name: a reward model's URL without scheme and slashes."""
    return re.sub(r"[^\w.:-]+", "_", name.partition("://")[2] or name)


def score_remedy(value: float) -> str:
    """Say how to bring a score into [0, 1]."""
    if value < 0.0:
        return "Only 1 is right; for rewards from -1 to 1 return (reward + 1) / 2."
    if value > 1.0:
        return "Only 1 is right; divide by the largest score that there can be."
    return "Return 0 for a response that deserves nothing."


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one response.

    Attributes:
        score: in [0, 1]; 1 is correct. Some reasoning-gym tasks give partial credit in between; a reward that knows
            only right and wrong goes by `correct`.
        answer: the final answer as it was extracted, empty if the response has none; majority votes count these.
        error: why the response could not be judged; empty if it was. A verdict with an error says nothing about the
            response: score is 0 and means "unknown".
        parts: what the score is made of, and other numbers about the response, by name: of several verifiers each one's
            own score, of a function that returns a dict its further numbers. Metrics show their means.
        fault: of what kind the error is, where the verifier itself is to blame: `RAISED` or `NO_VERDICT`. Empty for any
            other error, such as a time-out.

    Raises:
        ValueError: for a score outside [0, 1], NaN included.
    """

    score: float
    answer: str = ""
    error: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    fault: str = ""

    def __post_init__(self) -> None:
        if not 0.0 <= self.score <= 1.0:
            raise ValueError(f"a verdict's score lies in [0, 1], got {self.score}. {score_remedy(self.score)}")

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
        row: the data's row as plain containers, text and numbers; None unless the verifier asks for it
            (`JobVerifier.wants_row`).
    """

    verifier: str
    response_text: str
    reference: Any
    finish_reason: str = "stop"
    prompt_text: str = ""
    row: dict[str, Any] | None = None


class JobVerifier(ABC):
    """A verifier that needs more than a text and a reference: the prompt, its time limit, a check before the start.

    An instance in a module can be named like a function, as "package.module:instance".
    """

    wants_row: bool = False
    """Whether `VerifierJob.row` is to hold the row of the data; rows that nobody asks for are not kept."""

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
"""(response_text, reference, finish_reason) -> Verdict, as the built-in ones are. Pure; may raise, which becomes a
verdict with an error. What a function of a user's own may look like is `own_function`'s business."""

Verifier: TypeAlias = VerifierFunction | JobVerifier
"""A verifier: a function, or an object that takes the whole job where a function's arguments do not tell enough."""
