"""Calls each source's verifiers on its first row, in the pool, before anything is generated.

What can only be a mistake stops the run: a returned value that is no verdict, an exception whatever the response. What
may be the response's fault is a warning.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.verifiers.check import Findings
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.registry import shown_name
from megatron_fipo.verifiers.verdict import NO_VERDICT, RAISED, Verdict, VerifierJob, split_name


def first_held_out(held_out: Mapping[str, Sequence[Prompt]]) -> dict[str, Prompt]:
    """The first prompt of each evaluation source, by the source's key in the configuration."""
    return {f"data.evaluation.{name}": prompts[0] for name, prompts in held_out.items() if prompts}


class VerifierProbes:
    """Calls of each source's verifiers, in the pool, with the source's first row: once with an empty response, once
    with the reference as the response."""

    def __init__(self, pool: VerifierPool, prompts: Mapping[str, Prompt]) -> None:
        """Start the calls; they run while the caller does something else.

        Args:
            prompts: first prompt of each source, by the source's key.
        """
        self._asked: list[tuple[str, dict[str, Future[Verdict]]]] = []
        for key, prompt in prompts.items():
            texts = list(dict.fromkeys(["", _reference_text(prompt)]))
            for name in split_name(prompt.verifier):
                job = VerifierJob(name, "", prompt.reference, "stop", prompt.text, prompt.row)
                futures = pool.submit_all([replace(job, response_text=text) for text in texts])
                place = f"{key}.verifier={shown_name(name)}"
                self._asked.append((place, dict(zip(texts, futures, strict=True))))

    def findings(self) -> Findings:
        """Wait for the answers; a pool that cannot start is a problem, too."""
        problems, warnings = [], []
        for place, futures in self._asked:
            try:
                verdicts = {text: future.result() for text, future in futures.items()}
            except RuntimeError as error:
                return Findings((f"{place}: {_in_short(error)}",))
            problem, warning = _judged(place, verdicts)
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
        f"{place}: {verdict.error}. {called} and {_response(text)}. A response that causes this in the run does not "
        "count as wrong: its group is dropped."
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
