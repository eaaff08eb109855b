"""A run that was stopped goes on as if it never had been."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from megatron_fipo import train as train_module
from megatron_fipo.checkpoint.folder import describe_files, file_names, write_manifest
from megatron_fipo.run.folder import RunLock
from tests.checkpoints import contents
from tests.end_to_end import kills
from tests.end_to_end.runs import (
    differing,
    exported_weights,
    latest_checkpoint_name,
    metric_lines,
    step_lines,
    timeless,
    trace_files,
    train,
)


def test_two_steps_and_two_more_are_four(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, "train.num_steps=2", "checkpoint.export_huggingface=true", expected=0)
    assert latest_checkpoint_name(folder) == "step_000002"
    assert [line["step"] for line in metric_lines(folder)] == [0, 0, 1, 2]
    assert differing(exported_weights(folder), exported_weights(straight)), "two steps more change the weights"

    outcomes = train(folder, "train.num_steps=4", "train.resume=true", "checkpoint.export_huggingface=true", expected=0)
    assert "resumed from" in outcomes[0].said
    assert "2 steps are done" in outcomes[0].said
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
    (folder / "run.lock").touch()  # by which a run's folder is known
    outcomes = train(folder, "train.num_steps=1", world_size=1, expected=0)
    assert (tmp_path / "run.1" / "notes.txt").read_text() == "precious"
    assert not (folder / "notes.txt").exists()
    assert "was renamed to" in outcomes[0].said


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
    output = outcomes[0].said
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
    messages = " ".join(outcome.said for outcome in outcomes)
    assert "error: the checkpoint" in messages
    assert "could not be written" in messages
    assert "File too large" in messages
    assert "start the same command again" in messages
    assert latest_checkpoint_name(copied) == "step_000002"
    train(copied, *RUN, steps, prepare=partial(kills.without_generation, last_step=2), expected=0)
    assert differing(exported_weights(copied), exported_weights(straight)) == []


def _tiny_files_only() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, resource.RLIM_INFINITY))


def test_a_disk_that_is_full_in_a_rollout_stops_the_run_and_loses_nothing(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = train(folder, "train.num_steps=2", prepare=_tiny_files_only, expected=train_module.EXIT_STOPPED)
    told = [outcome.output for outcome in outcomes if "error: " in outcome.output]
    assert "Traceback" not in "".join(told)
    message = " ".join(told[0].partition("error: ")[2].split())
    assert "rollouts/step_000000/rank_00" in message
    assert "cannot be written: File too large (" in message
    assert "start the same command again: it goes on from the newest checkpoint and the recorded rollouts" in message
    train(folder, "train.num_steps=2", "train.resume=true", expected=0)
    assert [timeless(line) for line in step_lines(folder)] == [timeless(line) for line in step_lines(straight)[:2]]


def _deleted_in_step_1(folder: Path) -> None:
    """Delete the run's folder while its second step is trained."""
    original = train_module.Trainer.train_step

    def deleting(self: train_module.Trainer, step: int) -> dict[str, float]:
        metrics = original(self, step)
        if step == 1 and self.ranks.rank == 0:
            shutil.rmtree(folder)
        return metrics

    train_module.Trainer.train_step = deleting  # type: ignore[method-assign]


def test_a_run_whose_folder_is_deleted_stops(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    outcomes = train(
        folder, "train.num_steps=4", prepare=partial(_deleted_in_step_1, folder), expected=train_module.EXIT_STOPPED
    )
    (message,) = {" ".join(o.output.partition("error: ")[2].split()) for o in outcomes if "error: " in o.output}
    assert message.startswith(f"{folder} was deleted or replaced while the run was writing there")
    assert not any("Traceback" in outcome.output for outcome in outcomes)
    assert not folder.exists(), "nothing is written into a folder that nobody holds"


def test_a_finished_run_is_left_alone(copied: Path) -> None:
    (copied / "rollouts" / "step_000000").mkdir(parents=True, exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.name != "run.lock"}
    outcomes = train(copied, *RUN, "train.num_steps=2", "optimizer.learning_rate=1e-4", expected=0)
    output = outcomes[0].said
    assert "the run is finished: its 2 steps are done and saved, and nothing is done again" in output
    assert "Raise train.num_steps to go on" in output
    assert "belong to another configuration" not in output
    assert before == {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.name != "run.lock"}
    for outcome in outcomes:  # of torch and Megatron, where one looks for "resumed from"
        assert "FutureWarning" not in outcome.output
        assert "UserWarning" not in outcome.output
    shutil.rmtree(copied / "huggingface")  # as if it had been killed in its export
    train(copied, *RUN, "train.num_steps=2", expected=0)
    assert (copied / "huggingface" / "model.safetensors").is_file()
    assert latest_checkpoint_name(copied) == "step_000002"


class _Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def test_a_checkpoint_that_would_run_code_is_refused(copied: Path, tmp_path: Path) -> None:
    checkpoint, marker = copied / "checkpoints" / "step_000002", tmp_path / "it-ran"
    metadata: Any = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.storage_meta = _Runs(marker)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    write_manifest(checkpoint, describe_files(checkpoint, file_names(checkpoint)))
    message = _refused(copied, "train.num_steps=4")
    assert f"{checkpoint / '.metadata'} names posix.mkdir" in message
    assert "Only open checkpoints that you would run" in message
    assert not marker.exists()


def test_a_checkpoint_that_does_not_hold_what_it_says_is_refused(copied: Path) -> None:
    """Its manifest is right about its files, as after somebody has restored the wrong ones."""
    checkpoint = copied / "checkpoints" / "step_000002"
    first, second = sorted(checkpoint.glob("*.distcp"))[:2]
    parked = first.rename(checkpoint / "parked")
    second.rename(first)
    parked.rename(second)
    write_manifest(checkpoint, describe_files(checkpoint, file_names(checkpoint)))
    message = _refused(copied, "train.num_steps=4")
    assert f"{checkpoint}" in message
    assert "cannot be read" in message
    checkpoint.rename(checkpoint.with_name("step_000009"))
    shutil.copytree(copied / "checkpoints/step_000001", checkpoint)
    (copied / "checkpoints/latest").write_text("step_000002\n")
    assert f"{checkpoint} holds what step_000001 should: 1 steps are done in it" in _refused(copied)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("run.seed=7", "run.seed: 0 -> 7: it decides the order of the prompts"),
        ("data.train.chains.params.num_terms=5", "data.train.chains.params.num_terms: 4 -> 5: it decides the order"),
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
    output = outcomes[0].said
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
    assert any("cannot be written to: Not a directory" in outcome.said for outcome in outcomes)


def test_checkpoints_can_hold_an_export_and_be_written_beside_training(
    tmp_path: Path, straight: Path, two_steps: Path
) -> None:
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
    waited_for, second, fourth = (
        contents(run / "checkpoints" / name)
        for run, name in ((two_steps, "step_000002"), (folder, "step_000002"), (folder, "step_000004"))
    )
    assert differing(second, waited_for) == [], "weights and the optimizer's state"
    assert set(differing(second, fourth)) == set(second)


def test_a_step_that_was_stopped_half_way_needs_its_recorded_rollouts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    stop = partial(kills.signalled_in_update, step=0, num_done=1)
    train(folder, *RUN, "train.num_steps=1", prepare=stop, expected=train_module.EXIT_STOPPED)
    assert latest_checkpoint_name(folder) == "step_000000_update_0001"
    shutil.rmtree(folder / "rollouts")
    outcomes = train(folder, *RUN, "train.num_steps=1", expected=train_module.EXIT_BAD_INPUT)
    output = " ".join(outcome.said for outcome in outcomes)
    assert "32 of the rollouts that they train on are not recorded any more" in output
    assert "delete the checkpoint to go on from the one before" in output


def test_a_half_done_step_that_is_stopped_again_is_still_half_done(straight: Path, tmp_path: Path) -> None:
    """Its weights have moved: to begin the step anew with them would be another run."""
    folder, stopped = tmp_path / "run", train_module.EXIT_STOPPED
    for stop in (partial(kills.signalled_in_update, step=0, num_done=1), partial(kills.signalled_in_rollout, step=0)):
        train(folder, *RUN, "train.num_steps=2", prepare=stop, expected=stopped)
        assert latest_checkpoint_name(folder).removesuffix(".again") == "step_000000_update_0001"
    train(folder, *RUN, "train.num_steps=2", expected=0)
    assert [timeless(line) for line in step_lines(folder)] == [timeless(line) for line in step_lines(straight)[:2]]
    of_step, of_straight = (
        {name: content for name, content in trace_files(run).items() if name.startswith("step_000000_")}
        for run in (folder, straight)
    )
    assert of_step == of_straight, "those of the updates before it was stopped, and those after"
    assert len(of_step) > 1
