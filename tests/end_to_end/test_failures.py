"""What goes wrong in the middle of a run ends with an account of it, or costs a group, never the run's state."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo import train as train_module
from megatron_fipo.rollout import batch_source
from megatron_fipo.rollout.in_process.engine import InProcessEngine
from megatron_fipo.system.disk import DiskError
from tests.end_to_end.runs import latest_checkpoint_name, processes_of, quickstart_with, step_lines, timeless, train

PROMPTS = [f"{first}+{second}-1+4+6-2=" for first in range(1, 9) for second in range(1, 9)]


def _source(folder: Path, verifier: str, references: list[str]) -> Path:
    """A configuration that trains on PROMPTS with these references, in turn."""
    rows = [{"prompt": prompt, "answer": references[index % len(references)]} for index, prompt in enumerate(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {
        "kind": "jsonl",
        "path": str(folder / "prompts.jsonl"),
        "verifier": f"tests.end_to_end.verifiers:{verifier}",
    }
    return quickstart_with(folder / "config.yaml", source)


@pytest.mark.parametrize(
    ("verifier", "counts", "remedy"),
    [("always_wrong", "0 were all right, 12 all wrong, 0 failed", "too hard"),
     ("always_right", "12 were all right, 0 all wrong, 0 failed", "too easy")],
)  # fmt: skip
def test_prompts_without_a_signal_end_the_run(verifier: str, counts: str, remedy: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = train(
        folder,
        "sampling.max_generation_rounds=2",
        config=_source(tmp_path, verifier, ["7"]),
        expected=train_module.EXIT_STOPPED,
    )
    messages = [outcome.output for outcome in outcomes if "error: " in outcome.output]
    assert len(messages) == 1, "one rank speaks"
    message = " ".join(messages[0].partition("error: ")[2].split())
    assert message.startswith("step 0: 0 of 4 groups after 2 rounds of generation (sampling.max_generation_rounds=2)")
    assert f"Of 12 generated groups {counts}" in message
    assert f"Remedy: the prompts are {remedy} for this model" in message
    assert "Traceback" not in messages[0]
    assert latest_checkpoint_name(folder) == "step_000000"
    assert processes_of(str(folder)) == {}


def test_groups_that_cannot_be_judged_are_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = train(
        folder,
        "train.num_steps=1",
        "rollout.num_prompts_per_round=8",
        "rollout.num_samples_per_prompt=4",
        "verifier.timeout_s=2",
        config=_source(tmp_path, "as_the_reference_says", ["hang", "crash", "raise", "", "", "", "", ""]),
        world_size=1,
        prepare=_unshuffled,
        expected=0,
    )
    warnings = outcomes[0].said.split("Warning: step 0: dropped a group that could not be judged: ")
    assert len(warnings) == 4
    for number, (warning, reason) in enumerate(
        zip(
            warnings[1:],
            [
                "took longer than",
                "ended its process (exit code 7)",
                "raised ArithmeticError: this one cannot be judged",
            ],
            strict=True,
        )
    ):
        assert warning.startswith(f"source prompt {number}: ")
        assert reason in warning
    (line,) = step_lines(folder)
    assert line["rollout/dropped_groups/failed_share"] == 3 / line["rollout/generated_groups"]
    assert line["rollout/batch_groups"] == 4
    assert line["optim/grad_norm"] > 0
    assert processes_of(str(folder)) == {}


def _unshuffled() -> None:
    """Take a file's prompts in their order."""
    from megatron_fipo.data.prompts import PromptStream

    PromptStream._order = lambda self, position, epoch: list(range(len(PROMPTS)))  # type: ignore[method-assign]


def _nan_in_step_1() -> None:
    """Make an advantage of step 1's second minibatch NaN, of one response on all ranks."""
    original, calls = batch_source.assign_advantages, []

    def spoiling(groups: Any, estimator: str) -> None:
        original(groups, estimator)
        calls.append(estimator)
        if len(calls) == 2:
            groups[3].advantages[1] = torch.nan

    batch_source.assign_advantages = spoiling


def _nan_weight_in_step_1() -> None:
    """Make a weight of rank 1 NaN between step 1's old log-probs and its updates."""
    original = train_module.Trainer._update

    def spoiling(self: Any, step: int, *rest: Any) -> Any:
        if step == 1 and os.environ["RANK"] == "1":
            next(self.parts.actor.models[0].parameters()).data.view(-1)[0] = torch.nan
        return original(self, step, *rest)

    train_module.Trainer._update = spoiling  # type: ignore[method-assign]


def test_nan_in_the_loss_stops_before_the_optimizer_step(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = train(
        folder,
        "train.num_steps=2",
        "checkpoint.every_num_steps=1",
        prepare=_nan_in_step_1,
        expected=train_module.EXIT_STOPPED,
    )
    messages = [outcome.output for outcome in outcomes if "error: " in outcome.output]
    assert len(messages) == 1, "one rank speaks"
    message = " ".join(messages[0].partition("error: ")[2].split())
    assert message.startswith("step 1, rank ")
    assert "the loss is nan" in message
    assert "advantages of samples [25] of the step's batch" in message, "the second sample of the fourth group of eight"
    assert "No optimizer step was taken" in message
    assert latest_checkpoint_name(folder) == "step_000001"
    assert [line["step"] for line in step_lines(folder)] == [0]
    assert processes_of(str(folder)) == {}

    # What was saved is sound: without the NaN the run goes on as if nothing had been.
    train(folder, "train.num_steps=2", "train.resume=true", expected=0)
    assert [timeless(line) for line in step_lines(folder)] == [timeless(line) for line in step_lines(straight)[:2]]


def test_nan_in_a_weight_is_traced_to_its_samples(tmp_path: Path) -> None:
    outcomes = train(
        tmp_path / "run", "train.num_steps=2", prepare=_nan_weight_in_step_1, expected=train_module.EXIT_STOPPED
    )
    message = " ".join(" ".join(outcome.output for outcome in outcomes).partition("error: ")[2].split())
    assert message.startswith("step 1, rank 1: the loss is nan; log-probs of samples [")


def _nothing_is_written_at_the_end() -> None:
    """The engine that has something to write is the first rank's, as with servers' snapshots."""
    if os.environ["RANK"] != "0":
        return
    close = InProcessEngine.close

    def fail(engine: InProcessEngine) -> None:
        close(engine)
        raise DiskError("the weights could not be written")

    InProcessEngine.close = fail  # type: ignore[method-assign]


def test_what_an_engine_cannot_write_when_the_run_ends_is_told_and_all_else_is_released(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first, second = train(folder, "train.num_steps=1", prepare=_nothing_is_written_at_the_end)
    assert (first.code, second.code) == (train_module.EXIT_STOPPED, 0)
    assert "error: the weights could not be written" in first.said
    assert "Traceback" not in first.output
    assert latest_checkpoint_name(folder) == "step_000001"
    assert processes_of(str(folder)) == {}
    outcomes = train(folder, "train.num_steps=1", "train.resume=true", expected=0)
    assert "error:" not in outcomes[0].said, "the run was done all the same"
