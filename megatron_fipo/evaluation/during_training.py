"""Evaluates the policy in the course of a run: scores its responses, shows them, and writes them down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.console.console import Console
from megatron_fipo.console.samples import ShownSample
from megatron_fipo.evaluation.scores import EVALUATION_STEP, ProblemResult, evaluate_problems, write_problems
from megatron_fipo.parallel.agreement import decided_by_leader
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.rollout.engine import NO_PLACES, SamplingParams
from megatron_fipo.rollout.generation import GroupGenerator
from megatron_fipo.system.disk import write_text_whole

MAX_TYPED_CHARACTERS = 60
"""Longest prompt that is proposed for typing."""

_HEADLINE = ("avg@", "cons@", "pass@", "response_tokens/mean")


class HeldOutEvaluation:
    """Evaluates on every source of data.evaluation."""

    def __init__(
        self,
        config: Config,
        sets: Mapping[str, Sequence[Prompt]],
        generator: GroupGenerator,
        plane: DataPlane,
        console: Console,
        folder: Path | None,
    ) -> None:
        """
        Args:
            sets: prompts by source.
            plane: brings the judged problems to rank 0, which scores them.
            folder: where judged responses are written; None on all ranks but one.
        """
        self._config, self._sets, self._generator, self._plane = config, sets, generator, plane
        self._console, self._folder = console, folder
        self._solved: list[ProblemResult] = []
        """Of rank 0, which alone speaks."""

    def run(self, when: str, *, compare: bool = False, announce: bool = True) -> dict[str, float]:
        """Scores by flat name, the same on every rank; empty without sources. Collective over all ranks.

        Args:
            when: "before", "after" or a step; goes into file names and headings.
            compare: show the scores of the evaluation "before" beside these, if this run or the one that it goes on
                from has made it.
            announce: show samples and a table.

        Raises:
            DiskError: on the rank that writes, after the last collective call.
            ValueError: there too, if the scores to compare with are damaged.
        """
        if not self._sets:
            return {}
        every = self._problems()
        self._solved = [problem for problem in every if all(score == 1 for score in problem.scores)]
        metrics = decided_by_leader(lambda: evaluate_problems(every), self._plane.world)
        for source in self._sets:
            problems = [problem for problem in every if problem.source == source]
            if self._folder is not None:
                write_problems(self._folder / f"{when}_{source}.jsonl", problems)
            if announce:
                self._show_samples(when, source, problems)
        if self._folder is not None and metrics:
            write_text_whole(self._folder / f"{when}.json", json.dumps(metrics, indent=2) + "\n")
            if announce:
                before = self.scores_before() if compare else {}
                title = "Held-out, before and after" if before else "Held-out"
                after = _headline(metrics) if before else None
                self._console.evaluation_table(title, _headline(before or metrics), after)
        return metrics

    def prompts_to_try(self) -> list[str]:
        """The shortest and the longest prompt that a person could type and that the last evaluation found solved.

        Those of sources with a chat template are left out: they hold the template's marks. Empty where there is none.
        """
        typed = sorted(
            {
                problem.prompt
                for problem in self._solved
                if len(problem.prompt) <= MAX_TYPED_CHARACTERS
                and problem.prompt.isprintable()
                and not self._config.data.evaluation[problem.source].chat_template
            },
            key=lambda text: (len(text), text),
        )
        return [typed[0], typed[-1]] if len(typed) > 1 else typed

    def scores_before(self) -> dict[str, float]:
        """The scores before training, as this run or the one that it resumes wrote them; empty if none were written."""
        if self._folder is None or not (path := self._folder / "before.json").is_file():
            return {}
        try:
            scores = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise _no_scores(path, str(error)) from error
        if not isinstance(scores, dict) or not all(type(value) in (int, float) for value in scores.values()):
            raise _no_scores(path, "numbers by name were expected")
        return scores

    def _problems(self) -> list[ProblemResult]:
        """Every prompt with its judged responses, in the order of the sources, on rank 0; [] elsewhere. Collective."""
        section, rollout, share = self._config.evaluation, self._config.rollout, self._generator.share
        # In one call: each has its slowest response, and engines would wait for it once for each source.
        prompts = [prompt for prompts in self._sets.values() for prompt in prompts]
        own_places = range(len(prompts))[NO_PLACES if share is None else share.places]
        max_tokens = section.max_response_tokens or rollout.max_response_tokens
        sampling = SamplingParams(max_tokens, section.temperature, section.top_p)
        num_samples = section.num_samples_per_prompt
        with self._console.evaluation_progress(len(own_places) * num_samples) as progress:
            groups = self._generator.generate(
                [prompts[place] for place in own_places],
                num_samples,
                sampling,
                EVALUATION_STEP,
                on_sample=lambda sample: progress.advance(),
            )
        own = [(place, ProblemResult.from_group(group)) for place, group in zip(own_places, groups, strict=True)]
        return [problem for _, problem in sorted(self._plane.gathered(own), key=_place)]

    def _show_samples(self, when: str, source: str, problems: Sequence[ProblemResult]) -> None:
        references = {prompt.prompt_id: _reference_text(prompt.reference) for prompt in self._sets[source]}
        self._console.samples(
            f"Responses {when} training: {source}",
            [
                ShownSample(
                    prompt=problem.prompt,
                    response=problem.responses[0],
                    reference=references[problem.prompt_id],
                    answer=problem.answers[0],
                    accuracy=problem.scores[0],
                    num_tokens=problem.response_tokens[0],
                    truncated=problem.finish_reasons[0] == "length",
                )
                for problem in problems[: self._config.run.num_sample_prints]
            ],
        )


def _place(placed: tuple[int, ProblemResult]) -> int:
    return placed[0]


def _no_scores(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"{path} does not hold the scores that training began with ({reason}). Restore it from a copy, or delete it: "
        "the "
        "comparison at the end is then left out."
    )


def _headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The scores that are shown; the others are only in the metrics."""
    short = {name.removeprefix("evaluation/"): value for name, value in metrics.items()}
    return {
        name: value
        for name, value in short.items()
        if name.split("/", 1)[1].startswith(_HEADLINE) and "_ci95_" not in name
    }


def _reference_text(reference: Any) -> str:
    if isinstance(reference, dict) and "entry" in reference:
        return str(reference["entry"].get("answer", ""))
    return str(reference)
