"""avg@k, cons@k, pass@k by hand-computed values."""

from __future__ import annotations

import itertools
import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_fipo.evaluation.scores import (
    ProblemResult,
    avg_at_k,
    confidence_interval,
    cons_at_k,
    evaluate_problems,
    pass_at_k,
    write_problems,
)
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory
from megatron_fipo.system.disk import DiskError


def group(
    source: str,
    prompt_id: int,
    accuracies: list[float],
    *,
    answers: list[str] | None = None,
    lengths: list[int] | None = None,
    reasons: list[str] | None = None,
    errors: list[str] | None = None,
) -> Group:
    k = len(accuracies)
    lengths, reasons = lengths or [1] * k, reasons or ["stop"] * k
    answers, errors = answers or [str(a) for a in accuracies], errors or [""] * k
    samples = [
        Trajectory.of_response(
            prompt_id=prompt_id,
            sample_index=i,
            prompt_ids=torch.tensor([2]),
            response_ids=torch.zeros(lengths[i], dtype=torch.int64),
            rollout_log_probs=torch.zeros(lengths[i]),
            finish_reason=reasons[i],
            response_text=f"response {i}",
            accuracy=accuracies[i],
            answer=answers[i],
            error=errors[i],
        )
        for i in range(k)
    ]
    return Group(Prompt(prompt_id, source, f"question {prompt_id}", (2,), "exact", 42), samples)


def test_avg_is_the_share_of_correct_responses() -> None:
    assert avg_at_k([True, False, False, True]) == 0.5
    with pytest.raises(ValueError, match="at least one response"):
        avg_at_k([])


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        (["7", "7", "8"], [False, False, True], 0.0),  # the majority is wrong
        (["8", "7", "7"], [False, True, True], 1.0),
        (["8", "7"], [False, True], 0.0),  # a tie goes to the first answer …
        (["7", "8"], [True, False], 1.0),
        (["9", "8", "7", "7", "8"], [False, False, True, True, False], 0.0),  # … of those tied, not of all
        (["", "", "7"], [False, False, True], 1.0),  # no answer is no vote
        (["", ""], [False, False], 0.0),
    ],
)
def test_cons_is_the_majoritys_verdict(answers: list[str], correct: list[bool], expected: float) -> None:
    assert cons_at_k(answers, correct) == expected


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (5, 2, 4), (5, 0, 2), (6, 6, 2), (7, 1, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n: int, c: int, k: int) -> None:
    subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)


def test_pass_at_k_by_hand_and_refusals() -> None:
    # 1 - C(3, 2)/C(5, 2) = 1 - 3/10; the plug-in estimate 1 - (1 - 2/5)^2 = 0.64 is biased.
    assert pass_at_k(5, 2, 2) == pytest.approx(0.7)
    for arguments in [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6)]:
        with pytest.raises(ValueError, match=r"pass@k needs"):
            pass_at_k(*arguments)


def test_confidence_interval_over_problems() -> None:
    # 1, 0, 0, 0 of one response each: s^2 / n = 0.25 / 4 and p (1 - p) = 0.1875 would make 3 verdicts, but 4 problems
    # are at least 4. Wilson's for 1 of 4, by hand: (0.25 + 0.4802 +- 1.96 sqrt(0.046875 + 0.060025)) / 1.9604.
    assert confidence_interval([1.0, 0.0, 0.0, 0.0], 1) == pytest.approx((0.04559, 0.69936), abs=1e-5)
    # s^2 = 1/12 between four problems: 0.25 / (1/48) = 12 verdicts of the 32. 1.96 sqrt(1/48 + (1.96/24)^2) / 1.32013.
    assert confidence_interval([0.75, 0.25, 0.75, 0.25], 8) == pytest.approx((0.25378, 0.74622), abs=1e-5)
    # Responses to a problem that are all alike are one verdict: Wilson's for 2 of 4.
    assert confidence_interval([1.0, 1.0, 0.0, 0.0], 8) == pytest.approx((0.15004, 0.84996), abs=1e-5)
    # Problems that agree give as many verdicts as there are responses: Wilson's for 16 of 32.
    assert confidence_interval([0.5] * 4, 8) == pytest.approx((0.33630, 0.66370), abs=1e-4)
    # Nothing right says nothing of how alike responses to one problem are: Wilson's for 0 of 5, not 0 of 20.
    assert confidence_interval([0.0] * 5, 4) == pytest.approx((0.0, 3.8416 / 8.8416), abs=1e-6)
    assert confidence_interval([1.0], 32) == pytest.approx((1 / 4.8416, 1.0), abs=1e-6)
    with pytest.raises(ValueError, match="needs at least one problem"):
        confidence_interval([], 4)


def test_the_confidence_interval_holds_the_true_mean_where_the_normal_one_does_not() -> None:
    """30 problems whose true rates are spread around 2%, as a weak model's on AIME; 1,000 evaluations of 4 samples."""
    random = np.random.default_rng(0)
    rates = random.beta(0.1, 4.9, size=(1000, 30))
    averages = random.binomial(4, rates) / 4
    intervals = [confidence_interval(row.tolist(), 4) for row in averages]
    held = np.mean([low <= 0.02 <= high for low, high in intervals])
    assert 0.93 < held < 0.99
    half_widths = 1.96 * averages.std(axis=1, ddof=1) / math.sqrt(30)
    assert np.mean(abs(averages.mean(axis=1) - 0.02) <= half_widths) < 0.9


def scores_of(groups: list[Group]) -> dict[str, float]:
    return evaluate_problems([ProblemResult.from_group(group) for group in groups])


def test_metrics_of_two_sources() -> None:
    groups = [
        group(
            "aime",
            0,
            [1.0, 0.0, 1.0, 0.0],
            answers=["3", "4", "3", ""],
            lengths=[10, 20, 30, 40],
            reasons=["stop", "stop", "stop", "length"],
        ),
        group("aime", 1, [0.0, 0.0, 1.0, 0.5], answers=["1", "1", "2", "5"], lengths=[10, 10, 10, 70]),
        group("gsm", 0, [1.0], answers=["9"]),
    ]
    scores = scores_of(groups)
    assert list(dict.fromkeys(name.split("/")[1] for name in scores)) == ["aime", "gsm"]
    expected = {
        "avg@4": 0.375,  # (2/4 + 1/4)/2
        "cons@4": 0.5,  # problem 0 votes 3 (right), problem 1 votes 1 (wrong)
        "pass@1": 0.375,
        "pass@2": (1 - 1 / 6 + 1 - 3 / 6) / 2,  # C(2,2)/C(4,2) = 1/6 and C(3,2)/C(4,2) = 3/6
        "pass@4": 1.0,
        "score/mean": 3.5 / 8,
        "response_tokens/mean": 25.0,
        "response_tokens/min": 10.0,
        "response_tokens/p25": 10.0,
        "response_tokens/median": 15.0,  # 10 10 10 10 | 20 30 40 70
        "response_tokens/p75": 32.5,
        "response_tokens/max": 70.0,
        "truncated/share": 0.125,
        "no_answer/share": 0.125,
        "errors/count": 0.0,
        "problems/count": 2.0,
    }
    measured = {
        name.removeprefix("evaluation/aime/"): value for name, value in scores.items() if name.split("/")[1] == "aime"
    }
    interval = confidence_interval([0.5, 0.25], 4)
    assert (measured.pop("avg@4_ci95_low"), measured.pop("avg@4_ci95_high")) == interval
    assert measured == pytest.approx(expected)
    assert scores["evaluation/gsm/avg@1"] == scores["evaluation/gsm/cons@1"] == scores["evaluation/gsm/pass@1"] == 1.0
    assert scores["evaluation/gsm/avg@1_ci95_low"] == pytest.approx(1 / 4.8416)


def test_what_could_not_be_judged_is_wrong_and_counted() -> None:
    scores = scores_of([group("s", 0, [1.0, 1.0], errors=["", "timed out"])])
    assert scores["evaluation/s/avg@2"] == 0.5
    assert scores["evaluation/s/errors/count"] == 1.0


def test_partial_credit_is_not_correct() -> None:
    scores = scores_of([group("s", 0, [0.9, 0.9])])
    assert (scores["evaluation/s/avg@2"], scores["evaluation/s/score/mean"]) == (0.0, pytest.approx(0.9))


def test_problems_of_a_source_need_equally_many_responses() -> None:
    with pytest.raises(ValueError, match=r"source 's'.*got \[1, 2\]"):
        scores_of([group("s", 0, [1.0]), group("s", 1, [1.0, 0.0])])


def test_the_order_of_problems_does_not_matter() -> None:
    problems = [ProblemResult.from_group(group("s", i, [float(i % 2), 1.0])) for i in range(5)]
    assert evaluate_problems(problems) == evaluate_problems(problems[::-1])


def test_problems_are_written_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluation" / "problems.jsonl"
    write_problems(
        path,
        [ProblemResult.from_group(group("s", i, [1.0, 0.0], answers=["π", ""], lengths=[3, 4])) for i in range(2)],
    )
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2
    assert rows[1] == {
        "source": "s",
        "prompt_id": 1,
        "prompt": "question 1",
        "reference": "42",
        "responses": ["response 0", "response 1"],
        "correct": [True, False],
        "scores": [1.0, 0.0],
        "answers": ["π", ""],
        "response_tokens": [3, 4],
        "finish_reasons": ["stop", "stop"],
        "errors": ["", ""],
        "avg@2": 0.5,
        "cons@2": 1.0,
        "pass@2": 1.0,
    }


def test_whatever_a_verifier_answered_is_written_and_comes_back(tmp_path: Path) -> None:
    odd = ("\ud800", "4\udfff²")
    problem = ProblemResult("s", 0, "p\ud800", "r", odd, (True, False), (1.0, 0.0), odd, (1, 1), ("stop",) * 2, odd)
    write_problems(tmp_path / "deep" / "problems.jsonl", [problem, problem])
    first, second = (tmp_path / "deep" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert first == second
    assert "²" in first, "text that can be read stays so"
    found = json.loads(first)
    assert tuple(found["answers"]) == tuple(found["errors"]) == tuple(found["responses"]) == odd
    assert found["prompt"] == "p\ud800"


def test_problems_that_cannot_be_written_leave_the_file_as_it_was(tmp_path: Path) -> None:
    problem = ProblemResult("s", 0, "p", "r", ("x" * 5000,), (True,), (1.0,), ("a",), (1,), ("stop",), ("",))
    path = tmp_path / "problems.jsonl"
    path.write_text("before\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(DiskError, match=r"problems\.jsonl cannot be written: File too large .*free there"):
            write_problems(path, [problem])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "before\n"
