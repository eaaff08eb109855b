"""The run's folder: made, described, and never overwritten."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config, RunSection, TrainSection, load_config
from megatron_fipo.run.folder import RunFolder, RunLock, prepare, record_config
from megatron_fipo.system.disk import DiskError


def config_for(folder: Path, *, resume: bool = True) -> Config:
    return replace(
        Config(), run=RunSection(name="test", output_dir=str(folder)), train=TrainSection(resume=resume, num_steps=3)
    )


def test_everything_has_its_place() -> None:
    folder = RunFolder(Path("outputs/run"))
    assert folder.checkpoints == Path("outputs/run/checkpoints")
    assert folder.evaluation == Path("outputs/run/evaluation")
    assert folder.huggingface == Path("outputs/run/huggingface")
    assert folder.metrics == Path("outputs/run/metrics.jsonl")


@pytest.mark.parametrize("resume", [True, False])
def test_a_new_folder_says_what_the_run_is(tmp_path: Path, resume: bool) -> None:
    config = config_for(tmp_path / "deep" / "run", resume=resume)
    folder, lock, note = prepare(config)
    record_config(config, folder)
    lock.release()
    assert note == ""
    assert folder.root == tmp_path / "deep" / "run"
    assert (folder.root / "provenance.json").is_file()
    assert load_config(folder.root / "config.yaml") == config


def test_resuming_keeps_what_is_there(tmp_path: Path) -> None:
    folder, lock, _ = prepare(config_for(tmp_path / "run"))
    folder.metrics.write_text("kept\n")
    lock.release()
    again, _, note = prepare(config_for(tmp_path / "run"))
    assert note == ""
    assert again.metrics.read_text() == "kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_starting_over_sets_the_earlier_runs_aside(tmp_path: Path) -> None:
    for number in range(3):
        folder, lock, note = prepare(config_for(tmp_path / "run", resume=False))
        lock.release()
        assert not folder.metrics.exists()
        folder.metrics.write_text(f"run {number}\n")
        if number:
            assert note == (
                f"train.resume=false: the earlier run in {folder.root} was renamed to {folder.root}.{number}"
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.1", "run.2"]
    assert (tmp_path / "run.1" / "metrics.jsonl").read_text() == "run 0\n"
    assert (tmp_path / "run.2" / "metrics.jsonl").read_text() == "run 1\n"
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "run 2\n"


def test_an_empty_folder_is_no_earlier_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    folder, _, note = prepare(config_for(tmp_path / "run", resume=False))
    assert note == ""
    assert folder.root.is_dir()
    assert len(list(tmp_path.iterdir())) == 1


HOLD = (
    "import sys, pathlib; from megatron_fipo.run.folder import RunLock; lock = RunLock(pathlib.Path(sys.argv[1])); "
    "print('held', flush=True); sys.stdin.read()"
)


@pytest.mark.parametrize("resume", [True, False])
def test_two_runs_in_one_folder_are_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("the first run's\n")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"another run is writing there .process {holder.pid} on .* since 2"):
            prepare(config_for(tmp_path / "run", resume=resume))
        assert [path.name for path in tmp_path.iterdir()] == ["run"], "the first run's folder stays where it is"
    finally:
        holder.kill()
        holder.wait()
    prepare(config_for(tmp_path / "run", resume=resume))  # the kernel dropped the dead run's lock


def test_a_child_process_does_not_hold_the_lock(tmp_path: Path) -> None:
    """What a killed run had started may live on for a moment; the next run need not wait for it."""
    code = HOLD.replace("sys.stdin.read()", "import os; child = os.fork(); child or sys.stdin.read(); os._exit(0)")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.wait(timeout=30)
    RunLock(tmp_path).release()
    process.stdin.close()
    process.stdout.close()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"run.output_dir=.*/file/run cannot be written to: Not a directory"):
        prepare(config_for(tmp_path / "file" / "run"))


def test_a_file_where_a_folder_will_be_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(ValueError, match=r"checkpoints is no folder, and a run keeps files"):
        prepare(config_for(tmp_path))
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"metrics\.jsonl is no file"):
        prepare(config_for(tmp_path))


@pytest.mark.parametrize("names", [["thesis.tex"], ["config.yaml"], ["evaluation", "thesis.tex"], ["provenance.json"]])
def test_starting_over_sets_aside_nothing_but_runs(tmp_path: Path, names: list[str]) -> None:
    root = tmp_path / "mydata"
    root.mkdir()
    for name in names:
        (root / name).write_text("mine")
    with pytest.raises(ValueError, match=r"mydata holds .*, and no run has written there; train\.resume=false would"):
        prepare(config_for(root, resume=False))
    assert sorted(path.name for path in root.iterdir()) == sorted(names), "nothing is left in it either"
    assert [path.name for path in tmp_path.iterdir()] == ["mydata"]


def test_what_an_evaluation_before_the_run_left_is_set_aside(tmp_path: Path) -> None:
    (tmp_path / "run" / "evaluation").mkdir(parents=True)
    _, lock, note = prepare(config_for(tmp_path / "run", resume=False))
    lock.release()
    assert "was renamed to" in note


@pytest.mark.parametrize("how", ["deleted", "replaced", "its lock deleted"])
def test_a_folder_that_is_taken_away_is_noticed(tmp_path: Path, how: str) -> None:
    folder, lock, _ = prepare(config_for(tmp_path / "run"))
    lock.check()
    if how == "its lock deleted":
        (folder.root / "run.lock").unlink()
    else:
        shutil.rmtree(folder.root)
    if how == "replaced":
        folder.root.mkdir()
        RunLock(folder.root)  # as another run would
    with pytest.raises(DiskError, match="was deleted or replaced while the run was writing there"):
        lock.check()
    lock.release()


def test_a_configuration_that_cannot_be_written_is_told_in_words(tmp_path: Path) -> None:
    config = config_for(tmp_path / "run")
    folder, lock, _ = prepare(config)
    (folder.root / "provenance.json").mkdir()
    with pytest.raises(DiskError, match=r"provenance.json cannot be written: Is a directory .*Make room or mend"):
        record_config(config, folder)
    lock.release()
