"""Runs whose generation streams: repeatable bit for bit, also after a kill; the same batch for any number of ranks."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import train as train_module
from megatron_fipo.rollout.ledger import RolloutLedger
from tests.end_to_end import kills
from tests.end_to_end.runs import differing, exported_weights, sample_files, step_lines, timeless, trace_files, train
from tests.end_to_end.test_kill import kill
from tests.parallel.test_train_layouts import different_metrics

RUN = (
    "sampling.streaming=true",
    "sampling.max_surplus_age_steps=0",
    "train.num_steps=3",
    "train.resume=true",
    "checkpoint.every_num_steps=2",
    "checkpoint.export_huggingface=true",
)
HANGS_ON_TIME = "rollout/unused_tokens"
"""How far other responses were when the batch was full."""


def settled(folder: Path) -> list[dict[str, Any]]:
    """What a run's steps come to, whatever time anything took."""
    lines = [timeless(line) for line in step_lines(folder)]
    return [{name: value for name, value in line.items() if name != HANGS_ON_TIME} for line in lines]


def _keep_the_ledger() -> None:
    RolloutLedger.forget_before = lambda self, step: None  # type: ignore[method-assign]


def trained_on(folder: Path, step: int) -> list[int]:
    """The prompts of a step's batch."""
    (line,) = (folder / "rollouts" / f"step_{step:06d}" / "plan.json").read_text().splitlines()
    return list(json.loads(line.partition(" ")[2])["prompt_ids"])


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps on two ranks that nothing stops."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    train(folder, *RUN, prepare=_keep_the_ledger, expected=0)
    return folder


def assert_same(folder: Path, streamed: Path) -> None:
    assert settled(folder) == settled(streamed)
    assert differing(exported_weights(folder), exported_weights(streamed)) == []
    assert sample_files(folder) == sample_files(streamed)
    assert trace_files(folder) == trace_files(streamed)


def test_batches_are_full_in_the_order_of_prompts(streamed: Path) -> None:
    end = 0
    for step, line in enumerate(step_lines(streamed)):
        prompts = trained_on(streamed, step)
        assert len(prompts) == line["rollout/batch_groups"] == 4
        assert end <= prompts[0], "prompts are used once"
        assert prompts == sorted(prompts)
        used = round(line["rollout/generated_groups"])
        dropped = sum(line[f"rollout/dropped_groups/{kind}_share"] for kind in ("all_right", "all_wrong", "failed"))
        assert round(dropped * used) == used - 4, "nothing is generated beyond the batch that counts"
        assert prompts[-1] == end + used - 1
        end += used


@pytest.mark.parametrize(
    "prepare",
    [
        partial(kills.in_stream, step=1, num_samples=9),
        pytest.param(partial(kills.in_update, step=1, num_done=1), marks=pytest.mark.ci),
        pytest.param(partial(kills.in_log_probs, call=3), marks=pytest.mark.ci),
    ],
    ids=["in its stream", "among its updates", "after its batch was decided"],
)
def test_a_killed_run_goes_on_bit_for_bit(prepare: Any, streamed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill(folder, prepare, *RUN)
    assert len(step_lines(folder)) < 3
    train(folder, *RUN, expected=0)
    assert_same(folder, streamed)


@pytest.mark.ci
@pytest.mark.parametrize("number", range(4))
def test_a_run_killed_at_a_random_response(number: int, streamed: Path, tmp_path: Path) -> None:
    draw = random.Random(number)
    folder = tmp_path / "run"
    kill(folder, partial(kills.in_stream, step=draw.randrange(3), num_samples=draw.randint(1, 16)), *RUN)
    train(folder, *RUN, expected=0)
    assert_same(folder, streamed)


@pytest.mark.ci
def test_a_signal_in_a_stream_saves_and_leaves(streamed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(
        folder,
        *RUN,
        prepare=partial(kills.signalled_in_stream, step=1, num_samples=3),
        expected=train_module.EXIT_STOPPED,
    )
    assert len(step_lines(folder)) == 1
    train(folder, *RUN, expected=0)
    assert_same(folder, streamed)


def test_updates_go_on_without_generation(streamed: Path, tmp_path: Path) -> None:
    """Killed by a signal between updates: the plan and the responses are taken from their records."""
    folder = tmp_path / "run"
    signalled = partial(kills.signalled_in_update, step=1, num_done=1)
    train(folder, *RUN, prepare=signalled, expected=train_module.EXIT_STOPPED)
    train(folder, *RUN, "train.num_steps=2", prepare=partial(kills.without_generation, 1), expected=0)
    assert settled(folder) == settled(streamed)[:2]


def test_one_rank_comes_to_the_same_batches(streamed: Path, tmp_path: Path) -> None:
    """As dealing the responses out differently must."""
    folder = tmp_path / "run"
    train(folder, *RUN, "train.num_steps=1", world_size=1, prepare=_keep_the_ledger, expected=0)
    assert trained_on(folder, 0) == trained_on(streamed, 0)
    (line,), (expected, *_) = settled(folder), settled(streamed)
    assert different_metrics(line, expected) == {}


def test_the_first_batch_is_that_of_rounds(streamed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    rounds = (*RUN, "sampling.streaming=false", "train.num_steps=1")
    train(folder, *rounds, world_size=1, prepare=_keep_the_ledger, expected=0)
    assert trained_on(folder, 0) == trained_on(streamed, 0)
    assert step_lines(folder)[0]["perf/tokens"] == step_lines(streamed)[0]["perf/tokens"]
