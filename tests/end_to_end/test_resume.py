"""A run that was stopped goes on as if it never had been."""

from __future__ import annotations

from pathlib import Path

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

    # An evaluation, the steps, an evaluation; the second run's takes the place of the first's last one.
    assert [line["step"] for line in metric_lines(folder)] == [0, 0, 1, 2, 2, 3, 4]
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
