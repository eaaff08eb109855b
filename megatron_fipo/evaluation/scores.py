"""Scores of a policy on held-out problems: avg@k, cons@k, pass@k, lengths; and the file of judged problems.

A problem is a prompt with its k judged responses. A response counts as correct if its verifier accepted it in full
(score 1). One that could not be judged counts as wrong, so that a fault never raises a score; it is also counted apart.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_fipo.system.disk import write_text_whole
from megatron_fipo.verifiers.verdict import metric_part

if TYPE_CHECKING:
    from megatron_fipo.rl.trajectory import Group

EVALUATION_STEP = -1
"""Step that keys an evaluation's randomness: the same each time, so that policies meet the same random numbers."""


def avg_at_k(correct: Sequence[bool]) -> float:
    """Share of correct responses to one problem: the estimate of pass@1 from k samples."""
    _check_not_empty(correct)
    return sum(correct) / len(correct)


def cons_at_k(answers: Sequence[str], correct: Sequence[bool]) -> float:
    """Whether the most frequent answer to one problem is correct: 1 or 0.

    Answers are votes for their text, as the verifier extracted and normalised it; responses without an answer ("") do
    not vote, and if there is no vote the problem is wrong. Of answers with equally many votes the one that came first,
    by sample index, wins: samples are exchangeable, so this favours no answer and is the same in every run. The verdict
    on an answer is that of the first response that gave it.

    Args:
        answers: k extracted answers, by sample index.
        correct: k verdicts.
    """
    _check_not_empty(answers)
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    # Counter keeps the order of first appearance, and max takes the first of equals.
    winner = max(votes, key=lambda answer: votes[answer])
    return float(correct[list(answers).index(winner)])


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, eq. 1.

    Raises:
        ValueError: unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass@k needs 0 <= num_correct <= num_samples and 1 <= k <= num_samples; got num_correct={num_correct}, "
            f"num_samples={num_samples}, k={k}"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def confidence_interval(averages: Sequence[float], num_samples: int) -> tuple[float, float]:
    """95% confidence interval of the mean of avg@k over problems: of their choice and of the samples' noise.

    Wilson's score interval ("Probable Inference", JASA 22, 1927), for as many independent verdicts as have the variance
    that is found between problems, p (1 - p) n / s^2: at least one a problem, at most one a response (effective sample
    size of Korn and Graubard, Survey Methodology 24, 1998). Unlike mean +- 1.96 s / sqrt(n), it stays in [0, 1] and has
    a width where all responses are wrong: there nothing is known of the variance, and a problem counts as one verdict.

    Args:
        averages: n values of avg@k, one a problem.
        num_samples: k.

    Returns:
        Its lower and upper end.

    Raises:
        ValueError: if there are no problems.
    """
    if not averages:
        raise ValueError("a confidence interval over problems needs at least one problem")
    num_problems, mean = len(averages), float(np.mean(averages))
    verdicts = float(num_problems)
    if 0.0 < mean < 1.0 and num_problems > 1:
        variance = float(np.var(averages, ddof=1)) / num_problems
        most = num_problems * num_samples
        verdicts = min(max(mean * (1.0 - mean) / variance, verdicts), most) if variance > 0.0 else most
    z = 1.96
    centre = mean + z**2 / (2.0 * verdicts)
    spread = z * math.sqrt(mean * (1.0 - mean) / verdicts + (z / (2.0 * verdicts)) ** 2)
    scale = 1.0 + z**2 / verdicts
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


@dataclass(frozen=True)
class ProblemResult:
    """One problem with its judged responses; tuples by sample index."""

    source: str
    prompt_id: int
    prompt: str
    reference: str
    responses: tuple[str, ...]
    correct: tuple[bool, ...]
    scores: tuple[float, ...]
    answers: tuple[str, ...]
    response_tokens: tuple[int, ...]
    finish_reasons: tuple[str, ...]
    errors: tuple[str, ...]
    parts: tuple[dict[str, float], ...] = ()
    """The further numbers of each verdict, such as the scores of several verifiers; empty where no verdict has any."""

    @classmethod
    def from_group(cls, group: Group) -> ProblemResult:
        """Keep of a judged group what evaluation needs."""
        samples = group.samples
        return cls(
            source=group.prompt.source,
            prompt_id=group.prompt.prompt_id,
            prompt=group.prompt.text,
            reference=str(group.prompt.reference),
            responses=tuple(sample.response_text for sample in samples),
            correct=tuple(sample.accuracy == 1.0 and not sample.error for sample in samples),
            scores=tuple(float(sample.accuracy) for sample in samples),
            answers=tuple(sample.answer for sample in samples),
            response_tokens=tuple(sample.num_response_tokens for sample in samples),
            finish_reasons=tuple(sample.finish_reason for sample in samples),
            errors=tuple(sample.error for sample in samples),
            parts=tuple(sample.parts for sample in samples) if any(sample.parts for sample in samples) else (),
        )

    def row(self) -> dict[str, object]:
        """The problem as a JSON object, with its own scores."""
        k = len(self.correct)
        # Most verdicts have no parts; a column of nothing would be all there is to see of them.
        columns = {name: value for name, value in asdict(self).items() if name != "parts" or value}
        return columns | {
            f"avg@{k}": avg_at_k(self.correct),
            f"cons@{k}": cons_at_k(self.answers, self.correct),
            f"pass@{k}": pass_at_k(k, sum(self.correct), k),
        }


def evaluate_problems(problems: Sequence[ProblemResult]) -> dict[str, float]:
    """Scores under flat names, evaluation/<source>/…, sources in order of first appearance.

    Raises:
        ValueError: if a source's problems have different numbers of responses, or one has none.
    """
    by_source: dict[str, list[ProblemResult]] = {}
    for problem in problems:
        by_source.setdefault(problem.source, []).append(problem)
    return {
        f"evaluation/{source}/{name}": score
        for source, members in by_source.items()
        for name, score in _scores_of_source(source, members).items()
    }


def _scores_of_source(source: str, problems: list[ProblemResult]) -> dict[str, float]:
    counts = {len(problem.correct) for problem in problems}
    if len(counts) != 1:
        raise ValueError(
            f"evaluation source {source!r}: every problem needs the same number of responses; got {sorted(counts)}"
        )
    (k,) = counts
    averages = [avg_at_k(problem.correct) for problem in problems]
    avg, ci95 = float(np.mean(averages)), confidence_interval(averages, k)
    cons = float(np.mean([cons_at_k(problem.answers, problem.correct) for problem in problems]))
    passes = {
        size: float(np.mean([pass_at_k(k, sum(problem.correct), size) for problem in problems]))
        for size in _pass_sizes(k)
    }
    lengths = np.array([length for problem in problems for length in problem.response_tokens], dtype=np.float64)
    reasons = [reason for problem in problems for reason in problem.finish_reasons]
    return {
        f"avg@{k}": avg,
        f"avg@{k}_ci95_low": ci95[0],
        f"avg@{k}_ci95_high": ci95[1],
        f"cons@{k}": cons,
        **{f"pass@{size}": value for size, value in passes.items()},
        "score/mean": float(np.mean([score for problem in problems for score in problem.scores])),
        "response_tokens/mean": float(lengths.mean()),
        **{
            f"response_tokens/{name}": float(np.quantile(lengths, q))
            for name, q in (("min", 0.0), ("p25", 0.25), ("median", 0.5), ("p75", 0.75), ("max", 1.0))
        },
        "truncated/share": reasons.count("length") / len(reasons),
        "no_answer/share": float(np.mean([not answer for problem in problems for answer in problem.answers])),
        "errors/count": float(sum(bool(error) for problem in problems for error in problem.errors)),
        "problems/count": float(len(problems)),
        **_means_of_parts(problems),
    }


def _means_of_parts(problems: Iterable[ProblemResult]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for part in (part for problem in problems for part in problem.parts):
        for name, value in part.items():
            values.setdefault(f"verifier/{metric_part(name)}/mean", []).append(value)
    return {name: float(np.mean(numbers)) for name, numbers in values.items()}


def write_problems(path: str | Path, problems: Iterable[ProblemResult]) -> None:
    """Write one JSON object a line for each problem, replacing the file when all of them are written.

    Raises:
        DiskError: if it cannot be written; the file is as it was.
    """
    lines = (json.dumps(problem.row(), ensure_ascii=False) + "\n" for problem in problems)
    write_text_whole(Path(path), "".join(lines))


def _pass_sizes(k: int) -> list[int]:
    """Powers of two below k, and k: the points of a pass@k curve."""
    return [2**power for power in range(k.bit_length()) if 2**power < k] + [k]


def _check_not_empty(responses: Sequence[object]) -> None:
    if not responses:
        raise ValueError("a problem needs at least one response")
