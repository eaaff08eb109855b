"""Rewards, computed from verdicts, and group-relative advantages, computed from rewards.

Source: DAPO, arXiv 2503.14476 (rewards, overlong shaping); GRPO, arXiv 2402.03300 (group_std); Dr. GRPO, arXiv
2503.20783 (group_mean); RLOO, arXiv 2402.14740 (leave_one_out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.config import RewardSection
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Trajectory

STD_EPSILON = 1e-6


def group_std(rewards: Tensor) -> Tensor:
    """(R - mean) / (std + 1e-6) over a group [n], std unbiased; 0 where all rewards are equal."""
    _check_group(rewards)
    return group_mean(rewards) / (rewards.std(correction=1) + STD_EPSILON)


def group_mean(rewards: Tensor) -> Tensor:
    """R - mean over a group [n]."""
    _check_group(rewards)
    return rewards - rewards.mean()


def leave_one_out(rewards: Tensor) -> Tensor:
    """R_i - the mean of the others in the group [n]."""
    _check_group(rewards)
    others = (rewards.sum() - rewards) / (len(rewards) - 1)
    return rewards - others


ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "group_std": group_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
}


def is_correct(sample: Trajectory) -> bool:
    """Whether the verifier accepted the answer in full. Partial credit is not acceptance."""
    return sample.accuracy == 1.0


def overlong_penalty(length: int, max_response_tokens: int, buffer_tokens: int, penalty: float) -> float:
    """Return what the length adds to the reward: 0 up to max_response - buffer, then a linear fall to -penalty.

    Args:
        length: response tokens.
        max_response_tokens: the longest response.
        buffer_tokens: length of the slope; 0 turns the penalty off.
        penalty: the largest penalty, >= 0.

    Raises:
        ValueError: if the buffer is longer than the longest response.
    """
    if not 0 <= buffer_tokens <= max_response_tokens:
        raise ValueError(
            f"reward.overlong_buffer_tokens={buffer_tokens} must lie between 0 and rollout.max_response_tokens="
            f"{max_response_tokens}."
        )
    if not buffer_tokens:
        return 0.0
    excess = length - (max_response_tokens - buffer_tokens)
    return -penalty * min(max(excess / buffer_tokens, 0.0), 1.0)


def assign_rewards(groups: Sequence[JudgedGroup], config: RewardSection, max_response_tokens: int) -> None:
    """Set `JudgedGroup.rewards`: reward.correct or reward.incorrect, plus the overlong penalty.

    Raises:
        ValueError: if the overlong buffer does not fit into max_response_tokens.
    """
    for group in groups:
        group.rewards = np.array(
            [
                (config.correct if is_right else config.incorrect)
                + overlong_penalty(length, max_response_tokens, config.overlong_buffer_tokens, config.overlong_penalty)
                for is_right, length in zip(group.is_right.tolist(), group.rows["num_tokens"].tolist(), strict=True)
            ]
        )


def assign_advantages(groups: Sequence[JudgedGroup], estimator: str) -> None:
    """Set `JudgedGroup.advantages` from the rewards of the group; call `assign_rewards` first.

    Args:
        estimator: group_std, group_mean or leave_one_out.

    Raises:
        ValueError: on an unknown estimator, and on a group of fewer than two samples.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"advantages.estimator={estimator} is unknown; choose one of {', '.join(ESTIMATORS)}.")
    for group in groups:
        assert group.rewards is not None, "assign_rewards comes first"
        group.advantages = ESTIMATORS[estimator](torch.from_numpy(group.rewards)).numpy()


def _check_group(rewards: Tensor) -> None:
    if rewards.dim() != 1 or len(rewards) < 2:
        raise ValueError(
            f"a group needs at least 2 samples to compare; it has rewards of shape {tuple(rewards.shape)}. "
            "Set rollout.num_samples_per_prompt to 2 or more."
        )
