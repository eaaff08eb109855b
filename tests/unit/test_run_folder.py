"""The run's folder: made, described, and never overwritten."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_fipo.config import Config, RunSection, TrainSection, load_config
from megatron_fipo.run_folder import RunFolder, prepare


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
    folder, note = prepare(config)
    assert note == ""
    assert folder.root == tmp_path / "deep" / "run"
    assert (folder.root / "provenance.json").is_file()
    assert load_config(folder.root / "config.yaml") == config


def test_resuming_keeps_what_is_there(tmp_path: Path) -> None:
    folder, _ = prepare(config_for(tmp_path / "run"))
    folder.metrics.write_text("kept\n")
    again, note = prepare(config_for(tmp_path / "run"))
    assert note == ""
    assert again.metrics.read_text() == "kept\n"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_starting_over_sets_the_earlier_runs_aside(tmp_path: Path) -> None:
    for number in range(3):
        folder, note = prepare(config_for(tmp_path / "run", resume=False))
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
    folder, note = prepare(config_for(tmp_path / "run", resume=False))
    assert note == ""
    assert folder.root.is_dir()
    assert len(list(tmp_path.iterdir())) == 1
