"""Several verifiers that judge one response together: the score is the weighted mean of theirs.

Their names and weights travel as one name, "1.0*math + 0.2*judges:format", so that whatever goes by a verifier's name
(a prompt, a job, a worker's command line) carries several as it carries one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from megatron_fipo.rl.verifiers.asking import ask
from megatron_fipo.rl.verifiers.verdict import JobVerifier, Verdict, Verifier, VerifierJob

_SEPARATOR = " + "


def combined_name(weights: Mapping[str, float]) -> str:
    """One name for verifiers with their weights; a single verifier's own."""
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


@dataclass(frozen=True)
class Part:
    """One of the verifiers.

    Attributes:
        name: how it is called in messages and metrics.
        weight: of its score, >= 0; with 0 its score is shown and does not count.
    """

    name: str
    weight: float
    verifier: Verifier


class Combined(JobVerifier):
    """Asks its verifiers one after the other, within one time limit."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._parts = tuple(parts)
        self.wants_row = any(getattr(part.verifier, "wants_row", False) for part in parts)

    def check_ready(self) -> None:
        """Every verifier's own check."""
        for part in self._parts:
            if isinstance(part.verifier, JobVerifier):
                part.verifier.check_ready()

    def judge(self, job: VerifierJob, timeout_s: float) -> Verdict:
        """The weighted mean of the scores, which is 1 only where every verifier that counts gives 1.

        The answer is the first that a verifier gives. An error of one is an error of the verdict, the others' scores
        stay visible in its parts.
        """
        deadline = time.monotonic() + timeout_s
        verdicts = []
        for position, part in enumerate(self._parts):
            share = max(deadline - time.monotonic(), 0.0) / (len(self._parts) - position)
            verdicts.append(ask(part.name, part.verifier, replace(job, verifier=part.name), share))
        shown: dict[str, float] = {}
        for part, verdict in zip(self._parts, verdicts, strict=True):
            if not verdict.error:
                shown[part.name] = verdict.score
            # Below its verifier's name: two verifiers may call a number alike.
            shown |= {f"{part.name}.{name}": value for name, value in verdict.parts.items()}
        answer = next((verdict.answer for verdict in verdicts if verdict.answer), "")
        failed = next((verdict for verdict in verdicts if verdict.error), None)
        if failed is not None:
            return Verdict(0.0, answer, failed.error, shown, failed.fault)
        return Verdict(_mean([part.weight for part in self._parts], verdicts), answer, "", shown)


def _mean(weights: Sequence[float], verdicts: Sequence[Verdict]) -> float:
    total = math.fsum(weights)
    mean = math.fsum(weight * verdict.score for weight, verdict in zip(weights, verdicts, strict=True)) / total
    # 1 means right: rounding must neither make it nor miss it.
    if all(verdict.correct for weight, verdict in zip(weights, verdicts, strict=True) if weight):
        return 1.0
    return min(mean, math.nextafter(1.0, 0.0))
