"""The verdict says what the numbers say, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.evaluation.scores import ProblemResult
from megatron_fipo.report.finding import BAD, GOOD, NOTE, WARNING, Finding
from megatron_fipo.report.run_data import read_run
from megatron_fipo.report.verdict import paired_change, verdict
from tests.unit.report_runs import judged, scores_line, training_lines, write_run

RISING = [0.0, 0.1, 0.4, 0.5, 0.9, 1.0]
FLAT = [0.3, 0.7, 0.5, 0.5, 0.7, 0.3]
HEALTHY: dict[str, Sequence[float]] = {
    "reward__mean": RISING,
    "rollout__accuracy__mean": [0.5] * 6,
    "optim__updates": [8] * 6,
    "optim__grad_norm": [0.3] * 6,
    "policy__entropy__mean": [0.5, 0.5, 0.4, 0.4, 0.3, 0.3],
    "policy__kl__mean": [0.001] * 6,
    "policy__clip_fraction": [0.01] * 6,
    "policy__log_prob_shift__std": [0.01] * 6,
    "fipo__influence_weight__std_after_first_update": [0.05] * 6,
    "fipo__influence_weight__clipped_share": [0.02] * 6,
    "noise_floor__future_kl__share_of_later_std": [0.01] * 6,
    "rollout__batch_groups": [16] * 6,
}


def findings(
    folder: Path,
    columns: Mapping[str, Sequence[float | None]] | None = None,
    changes: Mapping[str, Any] | None = None,
    scores: Sequence[tuple[int, float]] = (),
    problems: Mapping[str, Sequence[ProblemResult]] | None = None,
) -> dict[str, Finding]:
    """Findings by title, of a run that is healthy but for the changes and finished unless they say otherwise."""
    lines = training_lines(**{**HEALTHY, **(columns or {})})
    settings = {} if scores else {"data.evaluation": {}}
    lines = [*(scores_line(0, avg) for step, avg in scores if step == 0), *lines]
    lines += [scores_line(step, avg) for step, avg in scores if step > 0]
    run = read_run(write_run(folder / "run", lines, {**settings, **(changes or {})}, problems=problems))
    return {finding.title: finding for finding in verdict(run)}


def test_a_healthy_run(tmp_path: Path) -> None:
    found = findings(tmp_path)
    assert {title: finding.level for title, finding in found.items()} == {
        "It is learning": GOOD,
        "FIPO acts": GOOD,
        "Nothing saturates or drifts": GOOD,
    }
    assert found["It is learning"].metrics == ("reward/mean",)
    # First third 0 and 0.1, last 0.9 and 1: 0.9 ± 4.303 · sqrt(2 · 0.005 / 2).
    assert "from 0.050 in the first 2 steps to 0.950 in the last 2: +0.900, 95 % interval +0.596 to +1.204" in (
        found["It is learning"].text
    )
    assert "spread by 0.05" in found["FIPO acts"].text
    assert "2 % of the tokens" in found["FIPO acts"].text


@pytest.mark.parametrize(
    ("rewards", "title", "level"),
    [
        (RISING, "It is learning", GOOD),
        (RISING[::-1], "The reward falls", BAD),
        (FLAT, "No clear change in reward", NOTE),
        (FLAT * 5, "No clear change in reward", WARNING),
        (RISING[:4], "Too early to tell whether it learns", NOTE),
        # From 0.05 to 0.9 and back to 0.3; to 0.8, which loses less than a quarter of it; a fall after no gain.
        ([0.0, 0.1, 0.05, 0.9, 0.91, 0.89, 0.31, 0.3, 0.29], "The reward rose and falls again", WARNING),
        ([0.0, 0.1, 0.05, 0.9, 0.91, 0.89, 0.81, 0.8, 0.79], "It is learning", GOOD),
        ([0.1, 0.9, 0.5, 0.5, 0.51, 0.49, 0.31, 0.3, 0.29], "No clear change in reward", NOTE),
        ([-1.0] * 6, "No clear change in reward", NOTE),
        ([-1.0] * 2 + [0.0] * 2 + [1.0] * 2, "It is learning", GOOD),
    ],
)
def test_whether_it_learns(tmp_path: Path, rewards: list[float], title: str, level: str) -> None:
    found = findings(tmp_path, {"reward__mean": rewards})
    assert next(iter(found)) == title
    assert found[title].level == level


def test_data_that_are_solved(tmp_path: Path) -> None:
    found = findings(tmp_path, {"reward__mean": FLAT, "rollout__accuracy__mean": [0.99] * 6})
    assert found["The data are solved"].level == NOTE
    assert "99 % of the responses are right" in found["The data are solved"].text


def test_an_unfinished_run_says_so_and_one_without_steps_says_nothing(tmp_path: Path) -> None:
    found = findings(tmp_path, changes={"train.num_steps": 20})
    assert found["Unfinished"].text == "6 of 20 steps are done."
    run = read_run(write_run(tmp_path / "new", [scores_line(0, 0.5)]))
    assert [finding.title for finding in verdict(run)] == ["No step is finished"]


@pytest.mark.parametrize(
    ("columns", "changes", "title", "level"),
    [
        ({"optim__updates": [1] * 6}, {}, "FIPO is inert", BAD),
        ({}, {"objective.influence_min": 1.0, "objective.influence_max": 1.0}, "FIPO is inert", BAD),
        ({"fipo__influence_weight__std_after_first_update": [1e-5] * 6}, {}, "FIPO hardly acts", WARNING),
        ({}, {"objective.future_kl": False, "algorithm": "dapo"}, "No Future-KL: dapo", NOTE),
        ({"noise_floor__future_kl__share_of_later_std": [0.6] * 6}, {}, "The weights follow rounding", BAD),
        ({"fipo__influence_weight__clipped_share": [0.95] * 6}, {}, "The influence weights saturate", WARNING),
        ({"policy__log_prob_shift__std": [0.0] * 6}, {}, "Nothing is learnt", BAD),
        ({"optim__grad_norm": [0.0] * 6}, {}, "Nothing is learnt", BAD),
        ({"optim__grad_norm": [0.3] * 4 + [0.0] * 2}, {"objective.future_kl": False}, "Nothing is learnt", BAD),
        ({"policy__clip_fraction": [0.2] * 6}, {}, "Updates are too large", WARNING),
        ({"policy__dual_clip_fraction": [0.01] * 6}, {}, "Dual clipping is no longer rare", WARNING),
        ({"policy__ratio_negative__p99_9": [9.0] * 6}, {}, "Large ratios in wrong responses", WARNING),
        ({"optim__grad_norm": [0.1, 0.2, 1, 1, 4.9, 5]}, {}, "The gradient norm grows", WARNING),
        ({"policy__kl__mean": [1e-3, 2e-3, 0, 0, 0.05, 0.052]}, {}, "The policy moves ever further in a step", WARNING),
        ({"mismatch__kl__mean": [1e-4, 1e-4, 0, 0, 0.01, 0.0105]}, {}, "Engine and actor drift apart", WARNING),
        ({"policy__entropy__mean": [0.3, 0.1, 0.1, 0.01, 0.002, 0.001]}, {}, "Entropy has collapsed", BAD),
        ({"policy__entropy__mean": [0.3, 0.3, 0.5, 0.8, 1.1, 1.2]}, {}, "Entropy rises", WARNING),
        ({"rollout__dropped_groups__all_right_share": [0.9] * 6}, {}, "The data are too easy", WARNING),
        ({"rollout__dropped_groups__all_wrong_share": [0.9] * 6}, {}, "The data are too hard", WARNING),
        (
            {"rollout__dropped_groups__failed_share": [0, 0, 0, 0, 0, 0.01]},
            {},
            "Responses could not be judged",
            WARNING,
        ),
        ({"rollout__truncated_share": [0.3] * 6}, {}, "Many responses are cut", WARNING),
        ({"mismatch__share_outside_0_5_to_2": [0.1] * 6}, {}, "Engine and actor differ", WARNING),
        ({"mismatch__masked_share": [0.9] * 6}, {}, "The rollout correction leaves out most tokens", WARNING),
        ({"rollout__generation_rounds": [8] * 6}, {}, "Batches hardly fill", WARNING),
        ({"fipo__filtered_sequences": [4] * 6}, {}, "The sequence filter is no longer rare", WARNING),
        (
            {"rollout__staleness_steps__max": [3] * 6},
            {"rollout.max_staleness_steps": 2, "rollout.too_stale": "drop"},
            "Tokens are older than allowed",
            BAD,
        ),
        (
            {"rollout__staleness_steps__max": [2] * 6},
            {"rollout.max_staleness_steps": 2},
            "It trains on stale tokens",
            NOTE,
        ),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, columns: dict[str, list[float]], changes: dict[str, Any], title: str, level: str
) -> None:
    renamed = {name.replace("p99_9", "p99.9").replace("0_5_to_2", "0.5_to_2"): row for name, row in columns.items()}
    found = findings(tmp_path, renamed, changes)
    assert found[title].level == level
    named = {name.replace("__", "/") for name in renamed}
    assert not named or named & set(found[title].metrics), "it names the metric that says so"
    is_about_fipo = title in ("FIPO is inert", "FIPO hardly acts")
    assert ("Nothing saturates or drifts" in found) is (level == NOTE or is_about_fipo)
    assert title not in findings(tmp_path / "healthy")


@pytest.mark.parametrize(
    ("columns", "changes"),
    [
        ({"policy__clip_fraction": [0.1] * 6}, {}),  # at the line
        ({"rollout__server_restarts": [0] * 6, "rollout__dropped_groups__failed_share": [0] * 6}, {}),
        ({"optim__grad_norm": [1.0, 1.01, 1.5, 1.5, 2.0, 2.01]}, {}),  # doubled, beyond noise
        ({"optim__grad_norm": [0.01, 0.011, 0.1, 0.1, 0.5, 0.51]}, {}),  # fifty times as much, and still small
        ({"fipo__filtered_sequences": [1] * 6}, {}),  # of 16 groups of 4 responses, in 2 epochs
        ({"rollout__generation_rounds": [5] * 6}, {}),
        # The first 11 steps of a healthy run of the quick-start.
        ({"mismatch__kl__mean": [0, 0, 6.5e-7, 1.8e-5, 0, 0, 7.6e-5, 0, 1.3e-4, 1.7e-4, 1.1e-4]}, {}),
    ],
)
def test_what_is_usual_is_not_blamed(tmp_path: Path, columns: dict[str, list[float]], changes: dict[str, Any]) -> None:
    assert "Nothing saturates or drifts" in findings(tmp_path, columns, changes)


def test_tokens_that_are_too_old_and_masked_are_not_trained_on(tmp_path: Path) -> None:
    changes = {"rollout.max_staleness_steps": 2, "rollout.too_stale": "mask"}
    found = findings(tmp_path, {"rollout__staleness_steps__max": [3] * 6}, changes)
    assert found["It trains on stale tokens"].level == NOTE
    assert "Tokens are older than allowed" not in found


def test_growth_that_may_be_noise_is_not_called_growth(tmp_path: Path) -> None:
    """From 0.15 to 4.75, yet one of the two last steps is as low as the first: 4.6 ± 54."""
    found = findings(tmp_path, {"optim__grad_norm": [0.1, 0.2, 1.0, 1.0, 0.5, 9.0]})
    assert "The gradient norm grows" not in found


def test_the_worst_comes_first_and_noise_is_no_action(tmp_path: Path) -> None:
    found = findings(
        tmp_path,
        {"policy__clip_fraction": [0.2] * 6, "noise_floor__future_kl__share_of_later_std": [0.0, 0, 0, 0, 0.7, 0.7]},
    )
    assert list(found) == ["It is learning", "The weights follow rounding", "Updates are too large"]
    assert "70 %" in found["The weights follow rounding"].text


@pytest.mark.parametrize(
    ("before", "after", "level", "title"),
    [
        # Differences 1, 1/2, 1/2, 1/2: 0.625 ± 3.182 · 0.25 / 2.
        ([[0, 0], [0, 0], [0, 1], [0, 1]], [[1, 1], [0, 1], [1, 1], [1, 1]], GOOD, "Held-out scores rise: held_out"),
        ([[1, 1], [0, 1], [1, 1], [1, 1]], [[0, 0], [0, 0], [0, 1], [0, 1]], BAD, "Held-out scores fall: held_out"),
        ([[0, 0], [1, 1]], [[0, 1], [0, 1]], NOTE, "No clear change in held-out scores: held_out"),
        ([[0, 0], [1, 1]], [[0, 1]], NOTE, "Held-out scores: held_out"),
        ([[0, 0], [0, 1]], [[0, 0], [0, 1]], NOTE, "No clear change in held-out scores: held_out"),
    ],
)
def test_held_out_scores(
    tmp_path: Path, before: list[list[int]], after: list[list[int]], level: str, title: str
) -> None:
    problems = {
        "before_held_out": judged(*before),
        "after_held_out": judged(*after),
    }
    averages = [sum(map(sum, rows)) / 2 / len(rows) for rows in (before, after)]
    found = findings(tmp_path, scores=[(0, averages[0]), (6, averages[1])], problems=problems)
    assert found[title].level == level
    assert found[title].metrics == ("evaluation/held_out/avg@2",)
    if level == GOOD:
        assert "from 0.250 to 0.875: +0.625, 95 % interval +0.227 to +1.023, over 4 problems" in found[title].text


def test_a_change_that_is_the_same_on_each_problem_tells_nothing_of_noise(tmp_path: Path) -> None:
    """The problems of both evaluations are there, so that they are not asked for."""
    problems = {"before_held_out": judged([0, 0], [0, 1]), "after_held_out": judged([0, 0], [0, 1])}
    found = findings(tmp_path, scores=[(0, 0.25), (6, 0.25)], problems=problems)
    text = found["No clear change in held-out scores: held_out"].text
    assert text.endswith("+0.000, over 2 problems. It is the same on each of them, which tells nothing of noise.")


def test_problems_with_other_prompts_are_not_paired(tmp_path: Path) -> None:
    """Data that were changed before a run was resumed have the same numbers of prompts."""
    before, after = judged([0, 0], [0, 1], [0, 1]), judged([1, 1], [0, 1], [1, 1])
    others = [replace(problem, prompt=f"another {problem.prompt}") for problem in after]
    problems = {"before_held_out": before, "after_held_out": others}
    found = findings(tmp_path, scores=[(0, 0.3), (6, 0.8)], problems=problems)
    assert "are needed to tell that from noise" in found["Held-out scores: held_out"].text


def test_the_paired_problems_are_those_of_the_scores_that_are_named(tmp_path: Path) -> None:
    """A run that goes on after its end has problems of that end, whose scores are no longer the newest."""
    lines = training_lines(**HEALTHY)
    lines = [scores_line(0, 0.5), *lines, scores_line(5, 0.0)]
    files = {"before_held_out": judged([0, 1], [0, 1], [1, 0]), "after_held_out": judged([1, 1], [1, 1], [1, 0])}
    files["step_000006_held_out"] = judged([0, 0], [0, 0], [0, 0])
    run = read_run(write_run(tmp_path / "run", lines, {"train.num_steps": 9}, problems=files))
    found = {finding.title: finding for finding in verdict(run)}
    assert "went from 0.500 to 0.000: -0.500" in found["No clear change in held-out scores: held_out"].text


def test_few_steps_tell_of_no_drift_and_no_metrics_of_nothing(tmp_path: Path) -> None:
    short = findings(tmp_path, {name: values[:2] for name, values in HEALTHY.items()}, {"train.num_steps": 2})
    assert short["Nothing saturates"].text.endswith("To tell a drift takes 6 steps.")
    assert "Nothing saturates or drifts" not in short
    run = read_run(write_run(tmp_path / "bare", training_lines(reward__mean=RISING)))
    found = {finding.title: finding for finding in verdict(run)}
    assert found["Not known whether anything saturates or drifts"].level == NOTE
    assert GOOD not in {finding.level for title, finding in found.items() if "saturates" in title}


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6])
@pytest.mark.parametrize("is_fipo", [True, False])
def test_a_short_run_is_neither_praised_nor_blamed(tmp_path: Path, steps: int, is_fipo: bool) -> None:
    columns = {name: values[:steps] for name, values in HEALTHY.items() if is_fipo or not name.startswith("fipo")}
    changes = {"train.num_steps": steps, "objective.future_kl": is_fipo}
    if not is_fipo:
        columns = {name: values for name, values in columns.items() if not name.startswith("noise_floor")}
    run = read_run(
        write_run(tmp_path / "run", training_lines(**columns), {**changes, "data.evaluation": {}}),
    )
    found = {finding.title: finding.level for finding in verdict(run)}
    assert not {WARNING, BAD} & set(found.values())
    assert ("It is learning" in found) is (steps == 6)
    assert ("FIPO acts" in found) is is_fipo


def test_a_first_update_whose_weights_are_not_1_is_not_inert(tmp_path: Path) -> None:
    """Against the tokens' authors there is a shift before any update."""
    columns = {**{name: values for name, values in HEALTHY.items() if "after_first" not in name}}
    columns |= {"optim__updates": [1] * 6, "fipo__influence_weight__std": [0.05] * 6}
    changes = {"objective.future_kl_reference": "behaviour", "data.evaluation": {}}
    run = read_run(write_run(tmp_path / "run", training_lines(**columns), changes))
    found = {finding.title: finding for finding in verdict(run)}
    assert "FIPO is inert" not in found
    assert found["FIPO acts"].text.startswith("The influence weights spread by 0.05")


def test_only_the_same_problems_are_paired() -> None:
    assert paired_change({0: 0.5}, {1: 0.5}) is None
    assert paired_change({}, {}) is None
    change = paired_change({0: 0.0, 1: 0.5}, {1: 1.0, 0: 0.0})
    assert change is not None
    assert change.mean == 0.25


def test_what_an_evaluation_before_the_last_one_said_is_past(tmp_path: Path) -> None:
    rows = {"evaluation__held_out__truncated__share": [0.5, 0.0]}
    found = findings(tmp_path, rows, scores=[(0, 0.5), (6, 0.5)])
    assert "Many responses are cut: held_out" not in found


def test_the_last_evaluation_is_looked_at(tmp_path: Path) -> None:
    base = "evaluation__held_out"
    rows = {f"{base}__truncated__share": [0.5], f"{base}__no_answer__share": [0.9], f"{base}__errors__count": [2]}
    found = findings(tmp_path, rows, scores=[(6, 0.5)])
    for title in (
        "Many responses are cut: held_out",
        "Many responses hold no answer: held_out",
        "Responses could not be judged: held_out",
    ):
        assert found[title].level == WARNING
