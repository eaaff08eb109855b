"""A run whose learning rate falls, that keeps its best model, and that ends when a bound is met."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_fipo import train as train_module
from tests.end_to_end.runs import differing, exported_weights, latest_checkpoint_name, metric_lines, step_lines, train

NUM_STEPS = 4
OVERRIDES = (
    f"train.num_steps={NUM_STEPS}",
    "train.resume=true",
    "rollout.num_prompts=8",
    "rollout.num_samples_per_prompt=8",
    "train.num_minibatches=8",
    "optimizer.learning_rate=1.0e-4",
    "optimizer.schedule=linear",
    "optimizer.num_warmup_steps=2",
    "optimizer.min_learning_rate=5.0e-5",
    "evaluation.every_num_steps=2",
    "data.evaluation.held_out.num_prompts=32",
    "evaluation.num_samples_per_prompt=4",
    "checkpoint.keep_best=evaluation/held_out/avg@4",
    "checkpoint.export_huggingface=true",
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ended by its own learning rate, which reaches the bound with the warm-up's last step."""
    folder = tmp_path_factory.mktemp("milestones") / "run"
    outcomes = train(folder, *OVERRIDES, "train.stop_when=optim/learning_rate >= 1.0e-4", expected=0)
    assert "optim/learning_rate is 0.0001 after 2 steps, and the run ends here" in outcomes[0].said
    assert latest_checkpoint_name(folder) == "step_000002"
    return folder


def test_it_stays_ended_until_the_rule_changes(ended: Path) -> None:
    rule = "train.stop_when=optim/learning_rate >= 1.0e-4"
    train(ended, *OVERRIDES, rule, expected=0)
    assert len(step_lines(ended)) == 2, "the same command trains no further"
    train(ended, *OVERRIDES, "optimizer.num_decay_steps=8", expected=0)
    rates = [line["optim/learning_rate"] for line in step_lines(ended)]
    peak, least, warmup, end = 1e-4, 5e-5, 2, 9
    expected = [peak / 2, peak] + [
        peak - (peak - least) * (step + 1 - warmup) / (end - warmup) for step in range(2, NUM_STEPS)
    ]
    assert rates == pytest.approx(expected, rel=1e-9)
    assert rates[-1] > least, "no step is made at the rate of the end"


def test_the_best_model_is_kept(ended: Path) -> None:
    scores = {
        line["step"]: line["evaluation/held_out/avg@4"]
        for line in metric_lines(ended)
        if "evaluation/held_out/avg@4" in line
    }
    record = json.loads((ended / "best" / "best.json").read_text())
    assert record["metric"] == "evaluation/held_out/avg@4"
    assert record["value"] == max(scores.values()) > scores[0], "at this rate the model learns at once"
    best = load_file(ended / "best" / "model.safetensors")
    base = load_file(Path("examples/quickstart/base") / "model.safetensors")
    assert best.keys() == base.keys()
    if record["step"] == NUM_STEPS:
        assert not differing(best, exported_weights(ended))
    else:
        assert differing(best, exported_weights(ended)), "it is not the last model"


def test_a_metric_that_no_step_has_is_named(tmp_path: Path) -> None:
    outcomes = train(tmp_path / "run", "train.num_steps=1", "train.stop_when=policy/entropy >= 3", expected=2)
    said = outcomes[0].said + outcomes[1].said
    assert "a step of this run has no metric policy/entropy" in said
    assert "policy/entropy/mean" in said
    assert train_module.EXIT_BAD_INPUT == 2
