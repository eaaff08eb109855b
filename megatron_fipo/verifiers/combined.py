"""Several verifiers that judge one response together: the score is the weighted mean of theirs.

Their names and weights travel as one name, "1.0*math + 0.2*judges:format", from the configuration through prompts to
here. The pool judges under each name apart, so that every verifier runs as its kind demands, and at the same time.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from megatron_fipo.verifiers.registry import shown_name
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob, split_name


class JudgingPool(Protocol):
    """Judges one job with one verifier, as a `VerifierPool` does."""

    async def judge(self, job: VerifierJob) -> Verdict:
        """One verifier's verdict."""


async def judge_combined(pool: JudgingPool, job: VerifierJob) -> Verdict:
    """Judge one response by all verifiers that its job names; one alone gives its verdict as it is."""
    weights = split_name(job.verifier)
    if len(weights) == 1:
        return await pool.judge(job)
    verdicts = await asyncio.gather(*(pool.judge(replace(job, verifier=name)) for name in weights))
    return combine(weights, verdicts)


def combine(weights: Mapping[str, float], verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict from those of several verifiers.

    The score is the weighted mean, and 1 only where every verifier that counts gives 1. The answer is the first that
    one gives. An error of one is an error of the verdict; the scores of the others stay visible in its parts.

    Args:
        weights: of each verifier, >= 0 and not all 0; with 0 a verifier's score is shown and does not count.
        verdicts: in the order of the weights.
    """
    parts: dict[str, float] = {}
    for name, verdict in zip(map(shown_name, weights), verdicts, strict=True):
        if not verdict.error:
            parts[name] = verdict.score
        # Below its verifier's name: two verifiers may call a number alike.
        parts |= {f"{name}.{key}": value for key, value in verdict.parts.items()}
    answer = next((verdict.answer for verdict in verdicts if verdict.answer), "")
    failed = next((verdict for verdict in verdicts if verdict.error), None)
    if failed is not None:
        return Verdict(0.0, answer, failed.error, parts, failed.fault)
    return Verdict(_mean(list(weights.values()), verdicts), answer, "", parts)


def _mean(weights: Sequence[float], verdicts: Sequence[Verdict]) -> float:
    pairs = list(zip(weights, verdicts, strict=True))
    # 1 means right: rounding must neither make it nor miss it.
    if all(verdict.correct for weight, verdict in pairs if weight):
        return 1.0
    mean = math.fsum(weight * verdict.score for weight, verdict in pairs) / math.fsum(weights)
    return min(mean, math.nextafter(1.0, 0.0))
