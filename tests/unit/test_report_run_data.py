"""What is read of a run's folder, and what is said of one that cannot be read."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from megatron_fipo.report.metrics_file import MetricTable, read_metrics
from megatron_fipo.report.run_data import evaluated_sources, read_measured_runs, read_run
from tests.unit.report_runs import judged, scores_line, training_lines, write_run

AVG = "evaluation/held_out/avg@2"


def test_lines_of_a_step_are_merged_by_name(tmp_path: Path) -> None:
    lines = [{"step": 0, "reward/mean": 0.5}, {"step": 1, "reward/mean": 0.75}, {"step": 1, "optim/updates": 8}]
    table = read_run(write_run(tmp_path / "run", lines)).metrics
    assert table.steps == table.training_steps == (0, 1)
    assert table.columns == {"reward/mean": [0.5, 0.75], "optim/updates": [None, 8.0]}


def test_evaluations_stand_at_the_number_of_steps_done(tmp_path: Path) -> None:
    """With an evaluation after every step, the file gives step 0 to the one before training and to the first after."""
    lines = [
        scores_line(0, 0.1),
        {"step": 0, "reward/mean": 0.0},
        scores_line(0, 0.2),
        {"step": 1, "reward/mean": 0.5},
        scores_line(1, 0.3),
        scores_line(2, 0.35),
    ]
    table = read_run(write_run(tmp_path / "run", lines)).metrics
    assert table.steps == (0, 1, 2)
    assert table.training_steps == (0, 1)
    assert table.evaluated_steps == (0, 1, 2)
    assert table.columns[AVG] == [0.1, 0.2, 0.35]
    assert table.columns["reward/mean"] == [0.0, 0.5, None]
    assert evaluated_sources(table) == [("held_out", 2)]


@pytest.mark.parametrize("torn", ['{"step": 2, "reward/me', "{", '{"step": 2, "reward/mean": 0.', "\x00\x00"])
def test_a_last_line_that_is_being_written_is_left_for_later(tmp_path: Path, torn: str) -> None:
    folder = write_run(tmp_path / "run", training_lines(reward__mean=[0.0, 1.0]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(torn)
    assert read_run(folder).metrics.steps == (0, 1)


@pytest.mark.parametrize(
    ("damaged", "reason"),
    [
        ('{"step": 1, "reward/me\n', "Unterminated"),
        ("\n", "Expecting value"),
        ("[1]\n", "line 2"),
        ('{"reward/mean": 1}\n', "step"),
        ('{"step": true}\n', "its step is True"),
        ('{"step": -1}\n', "its step is -1"),
        ('{"step": 1, "reward/mean": "high"}\n', "reward/mean is 'high'"),
        ('{"step": 1, "reward/mean": [1]}\n', "reward/mean is"),
        (f'{{"step": 1, "reward/mean": {"9" * 400}}}\n', "too large"),
        ("[" * 100_000 + "\n", "line 2"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, damaged: str, reason: str) -> None:
    folder = write_run(tmp_path / "run", training_lines(reward__mean=[0.0]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(damaged + '{"step": 1, "reward/mean": 1.0}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is no line of metrics.*mend or remove") as caught:
        read_run(folder)
    assert reason in str(caught.value)


def test_what_is_not_finite_is_nothing_measured(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "a": NaN, "b": Infinity, "c": null, "d": 1}\n')
    assert read_metrics(path).columns == {"a": [None], "b": [None], "c": [None], "d": [1.0]}


def test_a_folder_that_is_no_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/mine").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"mine is no folder here.*Did you mean outputs/mine"):
        read_run("mine")
    with pytest.raises(ValueError, match=r"has no config.yaml"):
        read_run("outputs/mine")


@pytest.mark.parametrize("text", ["[1, 2]", "algorithm: [", "5"])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_run(tmp_path)


def test_a_damaged_provenance_can_be_done_without(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", training_lines(reward__mean=[0.0]))
    for text in ('{"git"', "[1]"):
        (folder / "provenance.json").write_text(text)
        with pytest.raises(
            ValueError, match=r"provenance\.json cannot be read.* or remove it: the report does without"
        ):
            read_run(folder)
    (folder / "provenance.json").unlink()
    assert read_run(folder).provenance == {}


def test_a_run_without_numbers_has_no_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [])
    (folder / "metrics.jsonl").unlink()
    assert read_run(folder).metrics.steps == ()
    with pytest.raises(ValueError, match=r"no numbers.*metrics.jsonl=false"):
        read_measured_runs([str(folder)])


def test_a_run_is_given_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", training_lines(reward__mean=[0.0]))
    with pytest.raises(ValueError, match="given twice"):
        read_measured_runs([str(folder), str(tmp_path / "." / "run")])


def test_a_run_is_finished_when_its_last_scores_are_there(tmp_path: Path) -> None:
    steps = training_lines(reward__mean=[0.0] * 6)
    rows = {
        "before the end": ([*steps[:5], scores_line(4, 0.5)], False),
        "in the last evaluation": ([*steps, scores_line(5, 0.5)], False),
        "finished": ([*steps, scores_line(5, 0.5), scores_line(6, 0.5)], True),
        "ended by its rule": ([*steps[:3], scores_line(3, 0.5)], True),
        "went on after its end": ([*steps[:3], scores_line(3, 0.5), *steps[3:5]], False),
        "not begun": ([scores_line(0, 0.5)], False),
    }
    for name, (lines, is_finished) in rows.items():
        assert read_run(write_run(tmp_path / name, lines)).is_finished is is_finished, name
    without = {"data.evaluation": {}}
    assert read_run(write_run(tmp_path / "without", steps, without)).is_finished
    assert not read_run(write_run(tmp_path / "without2", steps[:5], without)).is_finished


def test_problems_are_read_as_they_were_written(tmp_path: Path) -> None:
    problems = judged([True, False], [False, False])
    run = read_run(write_run(tmp_path / "run", [], problems={"before_held_out": problems, "step_000004_held_out": []}))
    assert run.problems("before", "held_out") == problems
    assert run.problems("after", "held_out") is None


def test_the_newest_evaluation_is_that_of_the_newest_scores(tmp_path: Path) -> None:
    """A run that ended after 4 steps and goes on with more, resumed before step 6, has files of its first end and of
    steps that were given up."""
    files = {f"{when}_held_out": judged([1]) for when in ("before", "step_000005", "step_000008", "after")}
    steps = training_lines(reward__mean=[0.0] * 6)
    rows = {
        "goes on": ([scores_line(0, 0.1), *steps[:5], scores_line(4, 0.2), steps[5]], "step_000005"),
        "has ended": ([scores_line(0, 0.1), *steps, scores_line(6, 0.2)], "after"),
        "goes on without scores": ([scores_line(0, 0.1), *steps], None),
        "begins": ([scores_line(0, 0.1)], None),
    }
    for name, (lines, when) in rows.items():
        assert read_run(write_run(tmp_path / name, lines, problems=files)).latest_evaluation() == when, name


def test_values_of_a_long_run_are_found_by_their_step(tmp_path: Path) -> None:
    """Not by a search from the first step on, which would take minutes for all steps of 100,000."""
    steps = tuple(range(0, 400_000, 2))
    table = MetricTable(steps, {"x": list(map(float, steps))}, steps, (), False)
    before = time.process_time()
    assert [table.at("x", step) for step in steps] == table.columns["x"]
    assert time.process_time() - before < 20
    assert table.at("y", 2) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"correct": [1, 0]}, "correct holds 1"),
        ({"answers": ["2"]}, "every response needs"),
        ({"response_tokens": ["1", "1"]}, "response_tokens holds"),
        ({"prompt": None}, "prompt holds None"),
        ({"responses": None}, "NoneType"),
    ],
)
def test_a_damaged_problem_is_named(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    folder = write_run(tmp_path / "run", [], problems={"after_held_out": judged([True, False])})
    path = folder / "evaluation/after_held_out.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}) + "\n")
    with pytest.raises(ValueError, match=r"after_held_out\.jsonl, line 1 is no judged problem") as caught:
        read_run(folder).problems("after", "held_out")
    assert reason in str(caught.value)


def test_numbers_of_a_configuration_are_numbers(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", [], {"train.num_steps": "six", "run.seed": "none"}))
    with pytest.raises(ValueError, match=r"train.num_steps='six' is no whole number"):
        _ = run.num_steps
    assert run.seed is None
    assert math.isclose(run.config["objective.half_life_tokens"], 32.0)
