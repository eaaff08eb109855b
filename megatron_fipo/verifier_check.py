"""Verifiers are looked at before anything is generated: loaded in a process apart, then called on a source's first row.

What can only be a mistake stops the run in words: a name that means nothing, a signature that cannot be called, a value
returned that is no verdict, an exception whatever the response. What may be the response's fault is a warning.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from megatron_fipo.config import Config, DataSourceConfig, verifier_weights
from megatron_fipo.data.prompts import PromptStream
from megatron_fipo.rl.types import Prompt
from megatron_fipo.rl.verifiers.inspection import inspect_verifiers
from megatron_fipo.rl.verifiers.pool import VerifierPool
from megatron_fipo.rl.verifiers.registry import is_own, shown_name
from megatron_fipo.rl.verifiers.verdict import NO_VERDICT, RAISED, Verdict, VerifierJob


@dataclass(frozen=True)
class Findings:
    """What a look at verifiers has shown.

    Attributes:
        problems: why the run cannot be, each a sentence or more; with the source's key.
        warnings: what the user should know.
        row_readers: names of verifiers that ask for the rows of the data.
    """

    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    row_readers: frozenset[str] = field(default_factory=frozenset)

    def raise_problems(self) -> None:
        """Raise ValueError if there are any."""
        if len(self.problems) == 1:
            raise ValueError(self.problems[0])
        if self.problems:
            raise ValueError("\n  - ".join([f"{len(self.problems)} problems with verifiers:", *self.problems]))


def inspect_own(config: Config) -> Findings:
    """Load the verifiers that are a user's own, in a process apart. Reward models and built-in ones are not asked."""
    places: dict[str, list[str]] = {}
    for key, source in _sources(config):
        for name in verifier_weights(source):
            if is_own(name):
                places.setdefault(name, []).append(f"{key}.verifier")
    if not places:
        return Findings()
    found = inspect_verifiers(list(places))
    problems, warnings = [], []
    for name, keys in places.items():
        if found[name].problem:
            problems.append(f"{', '.join(keys)}: {found[name].problem}")
        elif found[name].doubt:
            warnings.append(f"{', '.join(keys)}: verifier {name}: {found[name].doubt}")
    row_readers = frozenset(name for name in places if found[name].wants_row)
    return Findings(tuple(problems), tuple(warnings), row_readers)


def _sources(config: Config) -> Iterator[tuple[str, DataSourceConfig]]:
    for part in ("train", "evaluation"):
        for name, source in getattr(config.data, part).items():
            yield f"data.{part}.{name}", source


def first_prompts(stream: PromptStream, held_out: Mapping[str, Sequence[Prompt]]) -> dict[str, Prompt]:
    """The first prompt of each source, by the source's key in the configuration."""
    training = {f"data.train.{name}": prompt for name, prompt in stream.first_prompts().items()}
    return training | first_held_out(held_out)


def first_held_out(held_out: Mapping[str, Sequence[Prompt]]) -> dict[str, Prompt]:
    """The same of evaluation sources alone."""
    return {f"data.evaluation.{name}": prompts[0] for name, prompts in held_out.items() if prompts}


class VerifierProbes:
    """Each source's verifier, asked in the pool about the source's first row: with an empty response, and with the
    reference as the response."""

    def __init__(self, pool: VerifierPool, prompts: Mapping[str, Prompt]) -> None:
        """Ask; the answers come while the caller does something else.

        Args:
            prompts: first one of each source, by the source's key.
        """
        self._asked: list[tuple[str, Prompt, dict[str, Future[Verdict]]]] = []
        for key, prompt in prompts.items():
            texts = dict.fromkeys(["", _reference_text(prompt)])
            jobs = [
                VerifierJob(prompt.verifier, text, prompt.reference, "stop", prompt.text, prompt.row) for text in texts
            ]
            self._asked.append((key, prompt, dict(zip(texts, pool.submit_all(jobs), strict=True))))

    def findings(self) -> Findings:
        """Wait for the answers; a pool that cannot start is a problem, too."""
        problems, warnings = [], []
        for key, prompt, futures in self._asked:
            try:
                verdicts = {text: future.result() for text, future in futures.items()}
            except RuntimeError as error:
                return Findings((f"{key}.verifier={shown_name(prompt.verifier)}: {_in_short(error)}",))
            problem, warning = _judged(f"{key}.verifier={shown_name(prompt.verifier)}", verdicts)
            problems += problem
            warnings += warning
        return Findings(tuple(problems), tuple(warnings))


def _judged(place: str, verdicts: Mapping[str, Verdict]) -> tuple[list[str], list[str]]:
    """(problems, warnings) of one source's probes."""
    failed = {text: verdict for text, verdict in verdicts.items() if verdict.error}
    if not failed:
        return [], []
    called = "It was called before the start, with the source's first row"
    for text, verdict in failed.items():
        if verdict.fault == NO_VERDICT:
            return [f"{place}: {verdict.error} {called} and {_response(text)}."], []
    text, verdict = next(iter(failed.items()))
    if all(verdict.fault == RAISED for verdict in verdicts.values()):
        responses = " as well as ".join(map(_response, verdicts))
        return [f"{place}: {verdict.error}. {called}, and raised with {responses}."], []
    return [], [
        f"{place}: {verdict.error}. {called} and {_response(text)}. A response of which this comes in the run makes no "
        "wrong answer: its group is dropped."
    ]


def _response(text: str) -> str:
    return f"the response {text!r:.60}" if text else "an empty response"


def _reference_text(prompt: Prompt) -> str:
    """A response that has something to judge: the reference as far as it is a text or a number."""
    return str(prompt.reference) if isinstance(prompt.reference, (str, int, float)) else "0"


def _in_short(error: RuntimeError) -> str:
    """The error without the traceback that it may hold: what it says first, and what it ends in."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].strip()}"
