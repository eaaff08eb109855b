"""Combines several verifiers on one response: the score is the weighted mean of their scores.

Their names and weights travel as one name, "1.0*math + 0.2*judges:format", from the configuration through prompts to
this module. The pool judges with each of them separately and concurrently, in the isolation of its kind.
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
    """A `VerifierPool`, as far as it is needed here."""

    async def judge(self, job: VerifierJob) -> Verdict:
        """Judge one job, whose name is that of one verifier."""


async def judge_combined(pool: JudgingPool, job: VerifierJob) -> Verdict:
    """Judge one response by all verifiers that its job names; the verdict of a single one is returned unchanged."""
    weights = split_name(job.verifier)
    if len(weights) == 1:
        return await pool.judge(job)
    verdicts = await asyncio.gather(*(pool.judge(replace(job, verifier=name)) for name in weights))
    return combine(weights, verdicts)


def combine(weights: Mapping[str, float], verdicts: Sequence[Verdict]) -> Verdict:
    """Combine the verdicts of several verifiers into one.

    The score is the weighted mean; it is 1 only if every verifier with a weight above 0 gives 1. The answer is the
    first non-empty one. If one verdict has an error, so does the result; the scores of the others stay in its parts.

    Args:
        weights: weight by verifier, >= 0 and not all 0; the score of a verifier with weight 0 is shown but not counted.
        verdicts: the verdicts, in the order of the weights.
    """
    parts: dict[str, float] = {}
    for name, verdict in zip(map(shown_name, weights), verdicts, strict=True):
        if not verdict.error:
            parts[name] = verdict.score
        # Prefixed with the verifier's name: two verifiers may use the same name for a number.
        parts |= {f"{name}.{key}": value for key, value in verdict.parts.items()}
    answer = next((verdict.answer for verdict in verdicts if verdict.answer), "")
    failed = next((verdict for verdict in verdicts if verdict.error), None)
    if failed is not None:
        return Verdict(0.0, answer, failed.error, parts, failed.fault)
    return Verdict(_mean(list(weights.values()), verdicts), answer, "", parts)


def _mean(weights: Sequence[float], verdicts: Sequence[Verdict]) -> float:
    pairs = list(zip(weights, verdicts, strict=True))
    # 1 means correct, so rounding must neither produce nor miss it.
    if all(verdict.correct for weight, verdict in pairs if weight):
        return 1.0
    mean = math.fsum(weight * verdict.score for weight, verdict in pairs) / math.fsum(weights)
    return min(mean, math.nextafter(1.0, 0.0))
