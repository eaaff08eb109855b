"""Rewards and advantages against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fipo.config import RewardSection
from megatron_fipo.rl.advantages import (
    assign_advantages,
    assign_rewards,
    group_mean,
    group_std,
    leave_one_out,
    overlong_penalty,
)
from megatron_fipo.rl.judged_group import JudgedGroup
from tests.unit.rl_samples import make_judged

REWARDS = torch.tensor([1.0, -1.0, -1.0, -1.0], dtype=torch.float64)


def test_group_std_is_unbiased() -> None:
    # Mean -0.5, deviations 1.5 and three times -0.5: variance 3 / 3 = 1.
    assert group_std(REWARDS).tolist() == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assert group_std(REWARDS)[0] == pytest.approx(1.5 / (1 + 1e-6), rel=1e-12)


def test_group_mean() -> None:
    assert group_mean(REWARDS).tolist() == [1.5, -0.5, -0.5, -0.5]


def test_leave_one_out() -> None:
    assert leave_one_out(REWARDS).tolist() == pytest.approx([2.0, -2 / 3, -2 / 3, -2 / 3])


@pytest.mark.parametrize("estimator", [group_std, group_mean, leave_one_out])
def test_equal_rewards_give_no_advantage(estimator: object) -> None:
    assert estimator(torch.ones(4)).tolist() == [0.0] * 4  # type: ignore[operator]


@pytest.mark.parametrize("estimator", [group_std, group_mean, leave_one_out])
def test_one_sample_is_no_group(estimator: object) -> None:
    with pytest.raises(ValueError, match=r"at least 2 samples.*num_samples_per_prompt"):
        estimator(torch.ones(1))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20480, -1.0), (30000, -1.0)],
)
def test_overlong_penalty_of_the_paper(length: int, penalty: float) -> None:
    assert overlong_penalty(length, 20480, 4096, 1.0) == penalty


def test_overlong_penalty_scales_and_turns_off() -> None:
    assert overlong_penalty(18432, 20480, 4096, 0.5) == -0.25
    assert overlong_penalty(20480, 20480, 0, 1.0) == 0.0
    with pytest.raises(ValueError, match=r"overlong_buffer_tokens=30 must lie between 0 and .*=20"):
        overlong_penalty(1, 20, 30, 1.0)


def rewards_of(group: JudgedGroup) -> list[float]:
    assert group.rewards is not None
    return group.rewards.tolist()


def advantages_of(group: JudgedGroup) -> list[float]:
    assert group.advantages is not None
    return group.advantages.tolist()


def test_assign_rewards() -> None:
    group = make_judged(0, [1.0, 0.0, 0.99, 1.0], lengths=[4, 4, 4, 9])
    assign_rewards(
        [group], RewardSection(correct=2.0, incorrect=-1.0, overlong_buffer_tokens=4), max_response_tokens=10
    )
    # Partial credit is not right; nine tokens are three quarters into the buffer.
    assert rewards_of(group) == [2.0, -1.0, -1.0, 1.25]


def test_assign_advantages() -> None:
    groups = [make_judged(0, [1.0, 0.0]), make_judged(1, [1.0, 0.0, 0.0, 0.0])]
    assign_rewards(groups, RewardSection(), max_response_tokens=10)
    assign_advantages(groups, "group_std")
    root = math.sqrt(2)
    assert advantages_of(groups[0]) == pytest.approx([1 / root, -1 / root], abs=1e-5)
    # Each group by itself.
    assert advantages_of(groups[1]) == pytest.approx([1.5, -0.5, -0.5, -0.5], abs=1e-5)
    assign_advantages(groups, "leave_one_out")
    assert advantages_of(groups[0])[0] == 2.0


def test_unknown_estimator() -> None:
    with pytest.raises(
        ValueError, match="estimator=gae is unknown; choose one of group_std, group_mean, leave_one_out"
    ):
        assign_advantages([make_judged(0, [1.0, 0.0])], "gae")
