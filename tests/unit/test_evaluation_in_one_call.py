"""All sources of an evaluation are generated in one call, and scored each by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from megatron_fipo.config import Config, DataSection, EvaluationSection
from megatron_fipo.console.console import Console
from megatron_fipo.evaluation.during_training import HeldOutEvaluation
from megatron_fipo.rl.trajectory import Group, Prompt
from megatron_fipo.system.disk import DiskError
from tests.unit.test_prompts_to_try import SOURCE, Alone, Answers

TEXTS = {"short": ["1+1=", "1+2="], "long": ["1+2+3=", "3+2+1=", "2+2+2="], "one": ["9-8="]}
WRONG = {"1+2=", "3+2+1=", "2+2+2="}


class CountedAnswers(Answers):
    """Notes the prompts of each call."""

    def __init__(self) -> None:
        super().__init__(WRONG)
        self.calls: list[list[str]] = []

    def generate(self, prompts: list[Prompt], *arguments: Any, **keywords: Any) -> list[Group]:
        self.calls.append([prompt.text for prompt in prompts])
        return super().generate(prompts, *arguments, **keywords)


def evaluated(names: list[str], folder: Path | None = None) -> tuple[dict[str, float], CountedAnswers]:
    config = Config(
        data=DataSection(evaluation=dict.fromkeys(names, SOURCE)),
        evaluation=EvaluationSection(num_samples_per_prompt=2),
    )
    sets = {
        name: [Prompt(index, name, text, (1,), "chain_arithmetic", "1") for index, text in enumerate(TEXTS[name])]
        for name in names
    }
    answers = CountedAnswers()
    evaluation = HeldOutEvaluation(
        config, sets, cast(Any, answers), cast(Any, Alone()), Console(config, enabled=False), folder
    )
    return evaluation.run("after"), answers


def test_one_call_for_all_sources_with_the_scores_of_each(tmp_path: Path) -> None:
    together, answers = evaluated(list(TEXTS), tmp_path)
    assert answers.calls == [[text for texts in TEXTS.values() for text in texts]]
    apart = {name: score for source in TEXTS for name, score in evaluated([source])[0].items()}
    assert together == apart
    assert together["evaluation/short/avg@2"] == 0.75
    assert together["evaluation/long/avg@2"] == pytest.approx(4 / 6)
    for name, texts in TEXTS.items():
        lines = (tmp_path / f"after_{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["prompt"] for line in lines] == texts


def test_without_sources_nothing_is_asked_for() -> None:
    scores, answers = evaluated([])
    assert scores == {}
    assert answers.calls == []


def test_what_cannot_be_written_is_told_after_the_call(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"after_short\.jsonl cannot be written"):
        evaluated(list(TEXTS), tmp_path / "file")
