"""Hand-made prompts, samples and groups for the tests of rl/."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory


def make_sample(
    num_response_tokens: int = 4,
    num_prompt_tokens: int = 3,
    *,
    prompt_id: int = 0,
    sample_index: int = 0,
    accuracy: float = 0.0,
    advantage: float = 0.0,
    finish_reason: str = "stop",
    error: str = "",
) -> Trajectory:
    """A sample whose prompt tokens are 100, 101, … and whose response tokens are 200, 201, …"""
    return Trajectory.of_response(
        prompt_id=prompt_id,
        sample_index=sample_index,
        prompt_ids=torch.arange(100, 100 + num_prompt_tokens),
        response_ids=torch.arange(200, 200 + num_response_tokens),
        rollout_log_probs=-torch.arange(1, num_response_tokens + 1) / 8,
        finish_reason=finish_reason,
        accuracy=accuracy,
        advantage=advantage,
        error=error,
    )


def make_group(
    prompt_id: int, accuracies: Sequence[float], *, step: int = 0, error: str = "", lengths: Sequence[int] = ()
) -> Group:
    """A group with these accuracies; `error` goes to its first sample."""
    samples = [
        make_sample(
            lengths[index] if lengths else 4,
            prompt_id=prompt_id,
            sample_index=index,
            accuracy=accuracy,
            error=error if index == 0 else "",
        )
        for index, accuracy in enumerate(accuracies)
    ]
    prompt = Prompt(prompt_id, "arithmetic", "1+1=", (100, 101, 102), "exact", {"answer": "2"})
    return Group(prompt=prompt, samples=samples, created_at_step=step)


def make_judged(
    prompt_id: int, accuracies: Sequence[float], *, step: int = 0, error: str = "", lengths: Sequence[int] = ()
) -> JudgedGroup:
    """What is known of such a group without its tokens."""
    return JudgedGroup.of(make_group(prompt_id, accuracies, step=step, error=error, lengths=lengths))
