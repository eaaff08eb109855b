"""A run that is killed at any moment and started again comes to the numbers of the one that never was.

Bit for bit in the same layout; on the recorded rollouts, to the rounding of float32 sums, in another.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_fipo.data.prompts import PromptStream
from megatron_fipo.parallel.local_ranks import RankError
from megatron_fipo.rollout.ledger import RolloutLedger
from tests.end_to_end import kills
from tests.end_to_end.conftest import STRAIGHT_STEPS
from tests.end_to_end.runs import (
    BASE,
    ROOT,
    differing,
    exported_weights,
    processes_of,
    sample_files,
    step_lines,
    timeless,
    trace_files,
    train,
)
from tests.parallel import layouts

RUN = (
    f"train.num_steps={STRAIGHT_STEPS}",
    "train.resume=true",
    "checkpoint.every_num_steps=2",
    "checkpoint.export_huggingface=true",
)
NUM_RANDOM_KILLS = int(os.environ.get("MEGATRON_FIPO_RANDOM_KILLS", "20"))


def kill(folder: Path, prepare: Callable[[], None], *overrides: str) -> None:
    """Train until the ranks kill themselves, and wait until all that they had started is gone too."""
    with pytest.raises(RankError):
        train(folder, *RUN, *overrides, prepare=prepare, timeout_s=120)
    _wait_until_gone(folder)


def _wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while left := processes_of(str(folder)):
        assert time.monotonic() < deadline, f"left running: {left}"
        time.sleep(0.05)


def assert_same(folder: Path, straight: Path) -> None:
    """Weights, metrics, samples and traces are those of the run that nothing stopped, bit for bit."""
    assert [timeless(line) for line in step_lines(folder)] == [timeless(line) for line in step_lines(straight)]
    assert differing(exported_weights(folder), exported_weights(straight)) == []
    assert sample_files(folder) == sample_files(straight)
    assert trace_files(folder) == trace_files(straight)
    assert len(trace_files(folder)) > 1


@pytest.fixture(scope="module")
def killed_in_update(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was killed among the updates of its last step."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    kill(folder, kills.KILLS["in an update"])
    return folder


@pytest.fixture
def killed(killed_in_update: Path, tmp_path: Path) -> Path:
    """A copy of it to go on from."""
    return Path(shutil.copytree(killed_in_update, tmp_path / "run"))


@pytest.mark.parametrize(
    "where",
    ["in a rollout", "in a save", *(pytest.param(name, marks=pytest.mark.ci) for name in list(kills.KILLS)[2:])],
)
def test_a_killed_run_goes_on_bit_for_bit(where: str, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill(folder, kills.KILLS[where])
    assert len(step_lines(folder)) < STRAIGHT_STEPS, "it was killed before its end"
    train(folder, *RUN, expected=0)
    assert_same(folder, straight)
    assert not [path for path in (folder / "checkpoints").iterdir() if ".partial" in path.name]


@pytest.fixture(scope="module")
def duration_s(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How long a run takes on this machine as it is now."""
    started = time.monotonic()
    train(tmp_path_factory.mktemp("timed") / "run", *RUN, expected=0)
    return time.monotonic() - started


@pytest.mark.long
@pytest.mark.parametrize("number", range(NUM_RANDOM_KILLS))
def test_a_run_killed_at_a_random_moment(number: int, straight: Path, duration_s: float, tmp_path: Path) -> None:
    """Anywhere in it; prints what it had come to."""
    folder = tmp_path / "run"
    seconds = random.Random(number).uniform(0.02, 0.95) * duration_s
    try:
        train(folder, *RUN, prepare=partial(kills.after, seconds), timeout_s=240)
        state = "it had ended before"
    except RankError:
        state = _state(folder)
    _wait_until_gone(folder)
    train(folder, *RUN, expected=0)
    assert_same(folder, straight)
    print(f"\n| {number} | {seconds / duration_s:.0%} | {state} | same |")


def _state(folder: Path) -> str:
    """Where a killed run stood."""
    lines = len(step_lines(folder)) if (folder / "metrics.jsonl").exists() else 0
    checkpoints = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    partial_saves = [name for name in checkpoints if ".partial" in name]
    recorded = {
        path.name: sum(file.read_bytes().count(b"\n") - 1 for file in path.glob("*.jsonl"))
        for path in sorted((folder / "rollouts").glob("step_*"))
    }
    newest = f"{list(recorded)[-1]} has {list(recorded.values())[-1]} responses" if recorded else "no rollouts"
    return f"{lines} steps, {newest}" + (", in a save" if partial_saves else "")


def test_in_another_layout_the_recorded_rollouts_are_replayed(straight: Path, killed: Path) -> None:
    """Context parallelism before, data parallelism after: nothing of what was recorded is generated again."""
    folder, last = killed, STRAIGHT_STEPS - 1
    train(folder, *RUN, "parallel.cp=1", prepare=partial(kills.without_generation, last_step=last), expected=0)
    for line, expected in zip(step_lines(folder), step_lines(straight), strict=True):
        for name in ("rollout/response_tokens/mean", "reward/mean", "rollout/generated_groups"):
            assert line[name] == expected[name]
        assert math.isclose(line["optim/grad_norm"], expected["optim/grad_norm"], rel_tol=layouts.GRADIENT_BOUND)
    base = load_file(ROOT / BASE / "model.safetensors")
    ours, theirs = exported_weights(folder), exported_weights(straight)
    apart = sum(float((ours[name] - weight).double().square().sum()) for name, weight in theirs.items())
    moved = sum(float((base[name].float() - weight).double().square().sum()) for name, weight in theirs.items())
    assert 0 < apart / moved <= layouts.WEIGHT_BOUND**2


# --- mistakes on purpose ---------------------------------------------------------------------------------------------


def _forget_the_cursor() -> None:
    PromptStream.load_state_dict = lambda self, state: None  # type: ignore[method-assign]


def _turn_verdicts_round() -> None:
    original = RolloutLedger.finished

    def shifted(self: RolloutLedger, *args: Any) -> Any:
        found = original(self, *args)
        for sample in found.values():
            sample.accuracy = 1.0 - sample.accuracy
        return found

    RolloutLedger.finished = shifted  # type: ignore[method-assign]


@pytest.mark.parametrize("mistake", [_forget_the_cursor, _turn_verdicts_round])
def test_a_mistake_in_resuming_is_noticed(mistake: Callable[[], None], straight: Path, killed: Path) -> None:
    train(killed, *RUN, prepare=mistake, expected=0)
    with pytest.raises(AssertionError):
        assert_same(killed, straight)
    assert differing(exported_weights(killed), exported_weights(straight))
