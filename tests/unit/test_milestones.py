"""When a run ends before its last step, and which model it keeps on the way."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_fipo.config import Config, DataSection, DataSourceConfig, OptimizerSection, StopRule, TrainSection
from megatron_fipo.config.cross_rules.milestones import milestone_problems
from megatron_fipo.run.best_model import BestModel


@pytest.mark.parametrize(
    ("text", "value", "is_met"),
    [
        ("evaluation/held_out/avg@4 >= 0.9", 0.9, True),
        ("evaluation/held_out/avg@4>=.9", 0.89, False),
        ("  evaluation/held_out/avg@4 <= 1e-3 ", 0.001, True),
        ("evaluation/held_out/avg@4 <= -2", -1.5, False),
        ("evaluation/held_out/avg@4 >= 0", math.nan, False),
        ("evaluation/held_out/avg@4 <= 0", math.nan, False),
    ],
)
def test_bounds(text: str, value: float, is_met: bool) -> None:
    rule = StopRule.parse(text)
    assert rule.metric == "evaluation/held_out/avg@4"
    assert rule.is_met({"evaluation/held_out/avg@4": value}) is is_met
    assert not rule.is_met({"another": 1.0})


@pytest.mark.parametrize(
    "text", ["a", ">= 1", "a > 1", "a >= b", "a >= 1.2.3", "a b >= 1", "a >= 1 or b >= 2", "a >= nan"]
)
def test_what_is_no_bound(text: str) -> None:
    with pytest.raises(ValueError, match="must be a metric, >= or <=, and a number"):
        StopRule.parse(text)


def falling(**optimizer: object) -> list[str]:
    config = Config(train=TrainSection(num_steps=10), optimizer=OptimizerSection(**{"schedule": "linear", **optimizer}))  # type: ignore[arg-type]
    return list(map(str, milestone_problems(config)))


def test_schedules_that_cannot_be() -> None:
    assert falling(num_warmup_steps=9) == []
    (problem,) = falling(num_warmup_steps=10)
    assert "must be below the steps at whose end the rate has fallen, 10" in problem
    (problem,) = falling(num_warmup_steps=5, num_decay_steps=5)
    assert "has fallen, 5" in problem
    (problem,) = falling(num_warmup_steps=0, learning_rate=1e-6, min_learning_rate=1e-5)
    assert "must not be above" in problem
    assert falling(schedule="constant", num_warmup_steps=10) == []


def test_scores_are_those_of_the_run() -> None:
    source = DataSourceConfig(kind="chain_arithmetic", verifier="chain_arithmetic")
    with_data = Config(
        data=DataSection(evaluation={"b": source}),
        train=TrainSection(stop_when="evaluation/b/pass@32 >= 1"),
    )
    assert list(milestone_problems(with_data)) == []
    (problem,) = milestone_problems(Config(train=TrainSection(stop_when="evaluation/b/pass@32 >= 1")))
    assert problem.key == "train.stop_when"
    assert "there is no data.evaluation to score" in problem.rule


def test_the_best_model_is_the_one_of_the_best_evaluation(tmp_path: Path) -> None:
    exported: list[float] = []
    weights = 0.0

    def export(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        exported.append(weights)

    best = BestModel("score", tmp_path / "best", export, is_writer=True)
    said = []
    for step, score in enumerate([0.5, 0.4, 0.6, 0.6, math.nan, 0.7]):
        weights = float(step)
        said.append(best.note(step, {"score": score}))
    assert exported == [2.0, 5.0], "the model that the run starts from, ties and NaN are not kept"
    assert [bool(text) for text in said] == [False, False, True, False, False, True]
    assert "score = 0.600 after 2 steps (before: 0.500)" in said[2]
    record = json.loads((tmp_path / "best" / "best.json").read_text())
    assert record == {"step": 5, "metric": "score", "value": 0.7}

    resumed = BestModel("score", tmp_path / "best", export, is_writer=True)
    resumed.load_state_dict(best.state_dict())
    assert resumed.note(6, {"score": 0.65}) == ""
    assert resumed.note(7, {"score": 0.8})


def test_nothing_is_kept_unless_asked(tmp_path: Path) -> None:
    def export(folder: Path) -> None:
        raise AssertionError("nothing was asked for")

    best = BestModel("", tmp_path / "best", export, is_writer=True)
    assert best.note(1, {"score": 0.5}) == ""
    assert best.step == 0
