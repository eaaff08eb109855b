"""SIGTERM and Ctrl-C at any moment: saved, left, nothing left behind, and the same command goes on."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import train as train_module
from megatron_fipo.actor.actor import Actor
from megatron_fipo.evaluation.scores import EVALUATION_STEP
from megatron_fipo.rollout import generation
from tests.end_to_end.runs import Outcome, latest_checkpoint_name, processes_of, step_lines, timeless, train

WORLD_SIZE = 2
NUM_STEPS = 3
GRACE_S = 30.0
"""torchrun kills what is still there so long after it has passed on a signal."""
PATIENCE_S = 180.0


def _pause(folder: Path) -> None:
    """Say that this rank is where the signal is to find it, and stay there until it has been sent."""
    if (folder / "sent").exists():
        return
    waiting = folder / f"rank{os.environ['RANK']}.tmp"
    waiting.write_text(str(os.getpid()))
    waiting.rename(waiting.with_suffix(".pid"))
    _wait_until((folder / "sent").exists, "the signal")


def _watch_generation(folder: Path, pause_in_step: int | None) -> None:
    """Note which steps generate; pause in one when its first response is judged, others being under way."""
    original = generation.generate_groups

    async def watched(*args: Any, **keywords: Any) -> Any:
        (folder / f"generated_in_step_{keywords['step']}").touch()
        on_sample = keywords["on_sample"]

        def pausing(sample: Any) -> None:
            on_sample(sample)
            _pause(folder)

        if keywords["step"] == pause_in_step:
            keywords["on_sample"] = pausing
        return await original(*args, **keywords)

    generation.generate_groups = watched


def _pause_in_rollout(folder: Path) -> None:
    _watch_generation(folder, pause_in_step=1)


def _pause_in_evaluation(folder: Path) -> None:
    _watch_generation(folder, pause_in_step=EVALUATION_STEP)


def _pause_in_update(folder: Path) -> None:
    """Pause before the first of step 1's updates."""
    original = Actor.update

    def pausing(self: Actor, microbatches: Any, loss_function: Any, step: int) -> Any:
        if step == 1:
            _pause(folder)
        return original(self, microbatches, loss_function, step)

    Actor.update = pausing  # type: ignore[method-assign]


def _pause_between_steps(folder: Path) -> None:
    """Pause when step 0 has made all its updates."""
    _watch_generation(folder, pause_in_step=None)
    original = train_module.step_metrics

    def pausing(*args: Any, **keywords: Any) -> Any:
        _pause(folder)
        return original(*args, **keywords)

    train_module.step_metrics = pausing


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(0.02)


@dataclass(frozen=True)
class Case:
    """A signal that finds a run somewhere."""

    number: signal.Signals
    prepare: Callable[[Path], None]
    checkpoint: str
    """What is to be saved."""
    ranks: tuple[int, ...] = (0, 1)
    """Those that the signal reaches."""


CASES = {
    "in a rollout": Case(signal.SIGTERM, _pause_in_rollout, "step_000001"),
    "in an update": Case(signal.SIGINT, _pause_in_update, "step_000001_update_0001"),
    "between steps, on one rank": Case(signal.SIGTERM, _pause_between_steps, "step_000001", ranks=(1,)),
    "in the evaluation": Case(signal.SIGINT, _pause_in_evaluation, "step_000000"),
}


def _interrupt(folder: Path, signals: Path, case: Case) -> list[Outcome]:
    """Train, send the signal when all ranks pause, and give them GRACE_S to end."""
    outcomes: list[Outcome] = []
    errors: list[BaseException] = []
    overrides = (f"train.num_steps={NUM_STEPS}", "train.resume=true")

    def run() -> None:
        try:
            outcomes.extend(train(folder, *overrides, prepare=partial(case.prepare, signals), timeout_s=PATIENCE_S))
        except BaseException as error:  # noqa: BLE001 - raised in the main thread below
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        pid_files = [signals / f"rank{rank}.pid" for rank in range(WORLD_SIZE)]
        _wait_until(lambda: bool(errors) or all(file.exists() for file in pid_files), "all ranks to pause")
        if not errors:
            workers = [command for command in processes_of(str(folder)).values() if "verifiers.worker" in command]
            assert len(workers) == WORLD_SIZE, "each rank has a verifier's worker while it runs"
            for rank in case.ranks:
                os.kill(int(pid_files[rank].read_text()), case.number)
            (signals / "sent").touch()
            thread.join(GRACE_S)
            assert not thread.is_alive(), f"the ranks did not end within {GRACE_S:.0f} s of the signal"
    finally:
        (signals / "sent").touch()
        thread.join()
    if errors:
        raise errors[0]
    return outcomes


@pytest.mark.parametrize("name", CASES)
def test_a_signal_saves_and_the_same_command_goes_on(name: str, straight: Path, tmp_path: Path) -> None:
    case = CASES[name]
    folder, signals = tmp_path / "run", tmp_path / "signals"
    signals.mkdir()
    outcomes = _interrupt(folder, signals, case)
    assert [outcome.code for outcome in outcomes] == [train_module.EXIT_STOPPED] * WORLD_SIZE
    assert "stopped by a signal, and saved; this goes on from the checkpoint:" in outcomes[0].said
    assert latest_checkpoint_name(folder) == case.checkpoint
    assert not list((folder / "checkpoints").glob("*.partial"))
    assert processes_of(str(folder)) == {}, "something was left running"
    if name == "between steps, on one rank":
        assert (signals / "generated_in_step_0").exists()
        assert not (signals / "generated_in_step_1").exists(), "generation began after the signal"
    if name == "in the evaluation":
        assert not list((folder / "evaluation").glob("before*")), "an evaluation cut short is no evaluation"

    outcomes = train(folder, f"train.num_steps={NUM_STEPS}", "train.resume=true", expected=0)
    assert f"resumed from {folder / 'checkpoints' / case.checkpoint}" in outcomes[0].said
    assert latest_checkpoint_name(folder) == f"step_{NUM_STEPS:06d}"
    assert processes_of(str(folder)) == {}
    lines = step_lines(folder)
    assert [timeless(line) for line in lines] == [timeless(line) for line in step_lines(straight)[:NUM_STEPS]]
