"""A user's function as a verifier: its parameters' names select what it is given; `returned` reads what it returns.

    def reward(response, answer):                          # any of the names, in any order
    async def reward(completion, prompt, row):             # awaited; row is the data's row as a dict
    def reward(response_text, **kwargs):                   # kwargs holds everything else
    def reward(response_text, reference, finish_reason):   # three parameters by position may have any names

A signature that cannot be called is refused when the function is loaded, before anything is generated.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Awaitable, Callable, Mapping
from inspect import Parameter
from typing import Any

from megatron_fipo.system.nearest_name import did_you_mean
from megatron_fipo.verifiers.returned import as_verdict
from megatron_fipo.verifiers.verdict import JobVerifier, Verdict, VerifierJob

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "response_text": ("response_text", "response", "completion", "solution_str"),
    "reference": ("reference", "answer", "ground_truth"),
    "finish_reason": ("finish_reason",),
    "prompt_text": ("prompt_text", "prompt"),
    "row": ("row",),
}
"""Accepted names of parameters, by the field of `VerifierJob` that such a parameter receives."""

_FIELD_OF = {name: field for field, names in ARGUMENTS.items() for name in names}
_BY_POSITION = ("response_text", "reference", "finish_reason")
_NAMED_KINDS = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
_ALMOST_THE_SAME = 0.8
"""Similarity to an accepted name from which a parameter with a default is reported as a likely misspelling."""


class SignatureError(TypeError):
    """A function whose parameters a verifier cannot be given."""


class OwnFunction(JobVerifier):
    """Calls a function with the fields of a job that its parameters' names select."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        """Check the signature and prepare the call.

        Args:
            name: the verifier's name, for messages.
            function: a plain function or a coroutine function.

        Raises:
            SignatureError: if it cannot be called.
        """
        self._function = function
        self._by_name, self.hint = _bound(name, function)
        self._leading = _positional_only(function) if self._by_name is not None else []
        self.wants_row = self._by_name is not None and "row" in self._by_name.values()

    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """Call the function. Raises what the function raises, and NoVerdictError if it returns no verdict."""
        if self._by_name is None:
            returned = self._function(job.response_text, job.reference, job.finish_reason)
        else:
            given = {name: getattr(job, field) for name, field in self._by_name.items()}
            leading = [given.pop(name) for name in self._leading]
            returned = self._function(*leading, **given)
        if inspect.isawaitable(returned):
            returned = asyncio.run(_awaited(returned))
        return as_verdict(returned)


async def _awaited(returned: Awaitable[Any]) -> Any:
    return await returned


def _bound(name: str, function: Callable[..., Any]) -> tuple[dict[str, str] | None, str]:
    """Fields of the job by parameter, or None if the three are passed by position; and likely mistakes, as text."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions written in C have none
        return None, ""
    if _goes_by_position(parameters):
        return None, ""
    by_name: dict[str, str] = {}
    missing, doubts = [], []
    leading = _positional_only(function)
    for parameter in parameters.values():
        if parameter.kind is Parameter.VAR_KEYWORD:
            by_name |= {known: field for known, field in _FIELD_OF.items() if known not in parameters}
        elif (parameter.kind in _NAMED_KINDS and parameter.name in _FIELD_OF) or parameter.name in leading:
            by_name[parameter.name] = _FIELD_OF[parameter.name]
        elif parameter.kind is not Parameter.VAR_POSITIONAL and parameter.default is Parameter.empty:
            missing.append(parameter)
        elif parameter.kind in _NAMED_KINDS and (
            hint := did_you_mean(parameter.name.lower(), _FIELD_OF, similarity=_ALMOST_THE_SAME)
        ):
            doubts.append(f"its parameter {parameter.name!r} is never given anything.{hint}")
    if missing:
        raise SignatureError(_refusal(name, missing))
    if not by_name:
        raise SignatureError(
            f"verifier {name} takes nothing that could be judged. It is called once for each response, with those of "
            f"these that it names: {_accepted_names()}."
        )
    return by_name, " ".join(doubts)


def _positional_only(function: Callable[..., Any]) -> list[str]:
    """Names of the positional-only parameters up to the first whose name is not accepted."""
    parameters = inspect.signature(function).parameters.values()
    known = itertools.takewhile(lambda p: p.kind is Parameter.POSITIONAL_ONLY and p.name in _FIELD_OF, parameters)
    return [parameter.name for parameter in known]


def _goes_by_position(parameters: Mapping[str, Parameter]) -> bool:
    """Whether the function takes (response_text, reference, finish_reason) by position.

    It does if it has three positional parameters and none has an accepted name, or if those with an accepted name stand
    in the place of that field and the third is finish_reason. So (text, truth, reason) works, and (response, answer,
    difficulty) never receives the finish reason as a difficulty. A function without accepted names that takes *args is
    called by position, too.
    """
    values = list(parameters.values())
    names_one = any(name in _FIELD_OF for name in parameters)
    if any(value.kind is Parameter.KEYWORD_ONLY and value.default is Parameter.empty for value in values):
        return False
    if not names_one and any(value.kind is Parameter.VAR_POSITIONAL for value in values):
        return True  # for example a decorator's wrapper, which hides the signature
    positional = [v for v in values if v.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    first, others = positional[:3], [value for value in values if value not in positional[:3]]
    if len(first) < 3 or any(value.default is Parameter.empty for value in positional[3:]):
        return False
    if not names_one:
        return True
    if any(value.name in _FIELD_OF or value.kind is Parameter.VAR_KEYWORD for value in others):
        return False
    at_their_place = all(_FIELD_OF.get(v.name, at) == at for v, at in zip(first, _BY_POSITION, strict=True))
    return at_their_place and first[2].name == "finish_reason"


def _refusal(name: str, missing: list[Parameter]) -> str:
    named = ", ".join(repr(parameter.name) for parameter in missing)
    hints = [
        f"{hint} for {parameter.name!r}?"
        for parameter in missing
        if parameter.name not in _FIELD_OF and (hint := did_you_mean(parameter.name.lower(), _FIELD_OF).rstrip("?"))
    ]
    by_position = [p.name for p in missing if p.kind is Parameter.POSITIONAL_ONLY]
    more = (
        " Parameters before a '/' are passed by position, and none after one that is unknown; remove the '/'."
        if by_position
        else ""
    )
    return (
        f"verifier {name} takes {named}, which a verifier is not given.{''.join(hints)}{more} It judges one response "
        f"at a time and may take, by name and in any order: {_accepted_names()}; everything through **kwargs; or "
        f"exactly three by position: {', '.join(_BY_POSITION)}. Other parameters need a default."
    )


def _accepted_names() -> str:
    return ", ".join(" or ".join(names) for names in ARGUMENTS.values())
