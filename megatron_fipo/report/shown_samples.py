"""Responses before and after training, side by side: the first prompts of each held-out source, chosen by nobody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from megatron_fipo.evaluation.scores import ProblemResult
from megatron_fipo.report.run_data import AFTER, BEFORE, RunData
from megatron_fipo.run.samples import TrainingSample, read_samples

_STEP = re.compile(r"step_(\d+)\.jsonl")
MOST_PER_SOURCE = 6
MOST_IN_ALL = 18
MAX_CHARACTERS = 20_000
"""Longer texts are cut there."""


def shown_samples(run: RunData) -> dict[str, list[dict[str, Any]]]:
    """Responses "before" and "after", as JSON objects.

    Of evaluations the same prompts, their first responses each. A run that has made none shows what it kept of its
    first and of its newest step of training, which are other prompts.

    Raises:
        ValueError: if a file is damaged.
    """
    latest = run.latest_evaluation()
    after = list(_of_evaluation(run, latest)) if latest else []
    before = list(_of_evaluation(run, BEFORE))
    if before or after:
        return {"before": before[:MOST_IN_ALL], "after": after[:MOST_IN_ALL]}
    names = [_STEP.fullmatch(path.name) for path in (run.folder / "samples").glob("*")]
    steps = sorted(int(match[1]) for match in names if match)
    if not steps:
        return {"before": [], "after": []}
    first = read_samples(run.folder, steps[0])
    newest = read_samples(run.folder, steps[-1]) if len(steps) > 1 else []
    return {
        "before": [_of_training(sample) for sample in first[:MOST_PER_SOURCE]],
        "after": [_of_training(sample) for sample in newest[:MOST_PER_SOURCE]],
    }


def _of_evaluation(run: RunData, when: str) -> Iterator[dict[str, Any]]:
    step = {BEFORE: 0, AFTER: run.metrics.num_steps_done}.get(when)
    if step is None:
        step = int(when.removeprefix("step_"))
    for source in run.evaluation_sources:
        for problem in (run.problems(when, source) or [])[:MOST_PER_SOURCE]:
            yield _of_problem(problem, step)


def _of_problem(problem: ProblemResult, step: int) -> dict[str, Any]:
    return {
        "source": problem.source,
        "prompt": _cut(problem.prompt),
        "response": _cut(problem.responses[0]),
        "reference": _cut(problem.reference),
        "answer": _cut(problem.answers[0]),
        "is_right": problem.correct[0],
        "num_tokens": problem.response_tokens[0],
        "step": step,
    }


def _of_training(sample: TrainingSample) -> dict[str, Any]:
    return {
        "source": sample.source,
        "prompt": _cut(sample.prompt),
        "response": _cut(sample.response),
        "reference": _cut(sample.reference),
        "answer": _cut(sample.answer),
        "is_right": sample.is_right,
        "num_tokens": sample.tokens,
        "step": sample.step,
    }


def _cut(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text)} characters)"
