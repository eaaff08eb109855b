"""The interface of verifiers: the job that a verifier is given, and the verdict that it returns."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

RAISED = "raised"
"""`Verdict.fault` of a verifier that raised an exception."""

NO_VERDICT = "no verdict"
"""`Verdict.fault` of a verifier that returned something that is no verdict, or that could not be loaded."""


_SEPARATOR = " + "


def combined_name(weights: Mapping[str, float]) -> str:
    """Join several verifiers' names and weights into one name; the name of a single verifier stays as it is."""
    if len(weights) == 1:
        return next(iter(weights))
    return _SEPARATOR.join(f"{float(weight)!r}*{name}" for name, weight in weights.items())


def split_name(name: str) -> dict[str, float]:
    """Split a name from `combined_name` into weights by verifier; {name: 1.0} for any other name."""
    parts = name.split(_SEPARATOR)
    if len(parts) == 1:
        return {name: 1.0}
    weights = {}
    for part in parts:
        weight, _, verifier = part.partition("*")
        weights[verifier] = float(weight)
    return weights


def metric_part(name: str) -> str:
    """Turn a part's name into one component of a metric's name: a URL loses its scheme, and slashes become "_"."""
    return re.sub(r"[^\w.:-]+", "_", name.partition("://")[2] or name)


def score_remedy(value: float) -> str:
    """Say how to bring a score into [0, 1]."""
    if value < 0.0:
        return "Only 1 is right; for rewards from -1 to 1 return (reward + 1) / 2."
    if value > 1.0:
        return "Only 1 is right; divide by the largest score that is possible."
    return "Return 0 for a response that deserves nothing."


@dataclass(frozen=True)
class Verdict:
    """A verifier's judgement of one response.

    Attributes:
        score: in [0, 1]; 1 is correct. Some reasoning-gym tasks give partial credit in between; a reward that only
            distinguishes right and wrong uses `correct`.
        answer: the final answer as extracted; empty if the response has none. Majority votes count these.
        error: why the response could not be judged; empty if it was judged. A verdict with an error says nothing about
            the response: its score is 0 and means "unknown".
        parts: further numbers about the response by name, such as the score of each of several verifiers, or the
            further numbers of a function that returns a dict. Metrics show their means.
        fault: the kind of an error that the verifier itself caused: `RAISED` or `NO_VERDICT`. Empty for other errors,
            such as a time-out.

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
        """Whether the answer was fully accepted: the score is 1."""
        return self.score == 1.0


@dataclass(frozen=True)
class VerifierJob:
    """One response to judge.

    Attributes:
        verifier: built-in name (`names.BUILTIN_VERIFIERS`), dotted path "package.module:function", URL of a reward
            model, or a `combined_name` of several.
        response_text: the response, without prompt and special tokens.
        reference: what the verifier compares the response with; must be picklable.
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
    """A verifier that needs more than a text and a reference: the prompt, the time limit, or a check before the start.

    An instance in a module can be named like a function, as "package.module:instance".
    """

    wants_row: bool = False
    """Whether `VerifierJob.row` must hold the row of the data; rows are kept only if a verifier wants them."""

    def check_ready(self) -> None:  # noqa: B027 - most have nothing to check
        """Check that the verifier can judge, once in every worker before its first job; an exception stops the run."""

    @abstractmethod
    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """Judge one response. An exception becomes a verdict with an error.

        Args:
            job: the response.
            timeout_s: time after which the pool kills the worker.
        """


VerifierFunction: TypeAlias = Callable[[str, Any, str], Verdict]
"""(response_text, reference, finish_reason) -> Verdict, the form of most built-in verifiers. Pure; an exception becomes
a verdict with an error. `own_function` wraps users' functions, which may have other signatures."""

Verifier: TypeAlias = VerifierFunction | JobVerifier
"""A verifier: a function, or an object that takes the whole job."""
