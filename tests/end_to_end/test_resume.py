"""A run that was stopped goes on as if it never had been."""

from __future__ import annotations

import resource
import shutil
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_fipo import train as train_module
from megatron_fipo.run_folder import RunLock
from tests.end_to_end import kills
from tests.end_to_end.runs import (
    differing,
    exported_weights,
    latest_checkpoint_name,
    metric_lines,
    step_lines,
    timeless,
    train,
)


def test_two_steps_and_two_more_are_four(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, "train.num_steps=2", "checkpoint.export_huggingface=true", expected=0)
    assert latest_checkpoint_name(folder) == "step_000002"
    assert [line["step"] for line in metric_lines(folder)] == [0, 0, 1, 2]
    assert differing(exported_weights(folder), exported_weights(straight)), "two steps more change the weights"

    outcomes = train(folder, "train.num_steps=4", "train.resume=true", "checkpoint.export_huggingface=true", expected=0)
    assert "resumed from" in outcomes[0].output
    assert "2 steps are done" in outcomes[0].output
    assert differing(exported_weights(folder), exported_weights(straight)) == []
    assert latest_checkpoint_name(folder) == "step_000004"

    # An evaluation before, the steps, one after; the first run's last one gives way.
    assert [line["step"] for line in metric_lines(folder)] == [0, 0, 1, 2, 3, 4]
    resumed, never_stopped = ([timeless(line) for line in step_lines(run)] for run in (folder, straight))
    assert resumed == never_stopped


def test_an_earlier_run_is_set_aside_unless_resumed(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "notes.txt").write_text("precious")
    outcomes = train(folder, "train.num_steps=1", world_size=1, expected=0)
    assert (tmp_path / "run.1" / "notes.txt").read_text() == "precious"
    assert not (folder / "notes.txt").exists()
    assert "was renamed to" in outcomes[0].output


RUN = ("train.resume=true", "checkpoint.every_num_steps=1", "checkpoint.export_huggingface=true")


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("two_steps") / "run"
    train(folder, *RUN, "train.num_steps=2", expected=0)
    return folder


@pytest.fixture
def copied(two_steps: Path, tmp_path: Path) -> Path:
    """A copy of it to go on from."""
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def _refused(folder: Path, *overrides: str) -> str:
    """What a run says that is refused before it does anything; the folder stays as it was."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "run.lock"}
    outcomes = train(folder, *RUN, *overrides, expected=train_module.EXIT_BAD_INPUT)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "run.lock"}
    (message,) = [outcome.output for outcome in outcomes if "error: " in outcome.output]
    assert "Traceback" not in message
    return " ".join(message.partition("error: ")[2].split())


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(copied: Path, straight: Path) -> None:
    (file, *_) = sorted((copied / "checkpoints" / "step_000002").glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    # The step between is trained again on its recorded rollouts.
    replay = partial(kills.without_generation, last_step=1)
    outcomes = train(copied, *RUN, "train.num_steps=2", prepare=replay, expected=0)
    output = " ".join(outcomes[0].output.split())
    assert "step_000002 is damaged and is passed over" in output
    assert "step_000001: 1 steps are done" in output
    train(copied, *RUN, "train.num_steps=4", expected=0)
    assert differing(exported_weights(copied), exported_weights(straight)) == []
    assert [timeless(line) for line in step_lines(copied)] == [timeless(line) for line in step_lines(straight)]


def _small_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))


def test_a_full_disk_stops_the_run_and_loses_nothing(copied: Path, straight: Path) -> None:
    steps = "train.num_steps=4"
    stopped = train_module.EXIT_STOPPED
    outcomes = train(copied, *RUN, steps, prepare=_small_files_only, expected=stopped)
    messages = " ".join(" ".join(outcome.output.split()) for outcome in outcomes)
    assert "error: the checkpoint" in messages
    assert "could not be written" in messages
    assert "File too large" in messages
    assert "start the same command again" in messages
    assert latest_checkpoint_name(copied) == "step_000002"
    train(copied, *RUN, steps, prepare=partial(kills.without_generation, last_step=2), expected=0)
    assert differing(exported_weights(copied), exported_weights(straight)) == []


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed=7", "run.seed: 0 -> 7: it decides the order of the prompts"),
        ("data.train.chains.params.num_terms=5", "data.train.chains.params.num_terms: 7 -> 5: it decides the order"),
        ("optimizer.distributed=false", "optimizer.distributed: true -> false: the optimizer's state is laid out"),
    ],
)
def test_a_change_that_would_corrupt_the_run_is_refused(two_steps: Path, override: str, told: str) -> None:
    message = _refused(two_steps, "train.num_steps=4", override)
    assert told in message
    assert "Change these keys back, start a new run" in message


def test_another_change_is_shown(copied: Path) -> None:
    override = "optimizer.learning_rate=1e-4"
    outcomes = train(copied, *RUN, "train.num_steps=3", override, expected=0)
    output = " ".join(outcomes[0].output.split())
    assert "changed since the checkpoint: optimizer.learning_rate: " in output
    assert "train.num_steps: 2 -> 3" in output
    assert step_lines(copied)[-1]["optim/learning_rate"] == pytest.approx(1e-4 * 3 / 5), "the third of five to warm up"


def test_two_runs_in_one_folder_are_refused(copied: Path) -> None:
    lock = RunLock(copied)
    try:
        message = _refused(copied, "train.num_steps=4")
    finally:
        lock.release()
    assert "another run is writing there" in message


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcomes = train(tmp_path / "file" / "run", *RUN, logs=tmp_path, expected=train_module.EXIT_BAD_INPUT)
    assert any("cannot be written to: Not a directory" in outcome.output for outcome in outcomes)


def test_checkpoints_can_hold_an_export_and_be_written_beside_training(tmp_path: Path, straight: Path) -> None:
    folder = tmp_path / "run"
    more = (
        "checkpoint.asynchronous=true",
        "checkpoint.export_with_checkpoints=true",
        "checkpoint.keep_last=1",
        "checkpoint.keep_every_num_steps=2",
    )
    train(folder, *RUN, *more, "train.num_steps=4", expected=0)
    names = sorted(path.name for path in (folder / "checkpoints").glob("step_*"))
    assert names == ["step_000002", "step_000004"]
    exported = load_file(folder / "checkpoints" / "step_000002" / "huggingface" / "model.safetensors")
    assert exported.keys() == exported_weights(straight).keys()
    assert differing(exported_weights(folder), exported_weights(straight)) == []
    assert differing(exported, exported_weights(straight)), "two steps more changed the weights"


def test_a_step_that_was_stopped_half_way_needs_its_recorded_rollouts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop = partial(kills.signalled_in_update, step=0, num_done=1)
    train(folder, *RUN, "train.num_steps=1", prepare=stop, expected=train_module.EXIT_STOPPED)
    assert latest_checkpoint_name(folder) == "step_000000_update_0001"
    shutil.rmtree(folder / "rollouts")
    outcomes = train(folder, *RUN, "train.num_steps=1", expected=train_module.EXIT_BAD_INPUT)
    output = " ".join(" ".join(outcome.output.split()) for outcome in outcomes)
    assert "made on 32 are not recorded any more" in output
    assert "delete the checkpoint to go on from the one before" in output
