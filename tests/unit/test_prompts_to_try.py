"""Which prompts a finished run proposes to type."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from megatron_fipo.config import Config, DataSection, DataSourceConfig, EvaluationSection
from megatron_fipo.console.console import Console
from megatron_fipo.evaluation.during_training import HeldOutEvaluation
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory
from megatron_fipo.rollout.engine import ALL_PROMPTS

SOURCE = DataSourceConfig(kind="chain_arithmetic", verifier="chain_arithmetic", num_prompts=1)


class Answers:
    """Stands for the generator: gives each prompt responses that were judged as its text is found in `wrong`."""

    def __init__(self, wrong: set[str]) -> None:
        self.wrong = wrong

    share = ALL_PROMPTS

    def generate(self, prompts: list[Prompt], *arguments: Any, **keywords: Any) -> list[Group]:
        groups = []
        for prompt in prompts:
            samples = [
                Trajectory.of_response(0, index, torch.tensor([1]), torch.tensor([1]), torch.zeros(1), "stop")
                for index in (0, 1)
            ]
            for index, sample in enumerate(samples):
                sample.accuracy = 0.0 if prompt.text in self.wrong and index else 1.0
            groups.append(Group(prompt, samples))
        return groups


class Alone:
    """Stands for the data plane of a run of one rank, and for its process group."""

    def __init__(self) -> None:
        self.world = self

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def gathered(self, own: list[Any]) -> list[Any]:
        return own


def evaluated(texts: dict[str, list[str]], wrong: set[str], **source: Any) -> list[str]:
    config = Config(
        data=DataSection(evaluation={name: replace(SOURCE, **source) for name in texts}),
        evaluation=EvaluationSection(num_samples_per_prompt=2),
    )
    sets = {
        name: [Prompt(index, name, text, (1,), "chain_arithmetic", "1") for index, text in enumerate(of_source)]
        for name, of_source in texts.items()
    }
    generator = cast(Any, Answers(wrong))
    evaluation = HeldOutEvaluation(config, sets, generator, cast(Any, Alone()), Console(config, enabled=False), None)
    assert evaluation.prompts_to_try() == [], "nothing was evaluated yet"
    evaluation.run("after")
    return evaluation.prompts_to_try()


def test_the_shortest_and_the_longest_that_were_solved() -> None:
    texts = ["1+2+3=", "1+2=", "1+1=", "1+2+3+4=", "9-8-1+2+3="]
    assert evaluated({"a": texts[:3], "b": texts[3:]}, {"1+1=", "9-8-1+2+3="}) == ["1+2=", "1+2+3+4="]


@pytest.mark.parametrize("text", ["1" * 61, "two\nlines", "\x1b[31mred"])
def test_what_nobody_could_type_is_left_out(text: str) -> None:
    assert evaluated({"a": ["1+2=", text]}, set()) == ["1+2="]


def test_nothing_where_nothing_was_solved_or_templates_write_the_prompt() -> None:
    assert evaluated({"a": ["1+2="]}, {"1+2="}) == []
    assert evaluated({"a": ["1+2="]}, set(), chat_template=True) == []
