"""The responses of one step of the 32B recipe, made up: their lengths and verdicts, and, where wanted, their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_fipo.config import Config, load_config
from megatron_fipo.rl.advantages import assign_advantages, assign_rewards
from megatron_fipo.rl.dynamic_sampling import DynamicSampler
from megatron_fipo.rl.judged_group import RESPONSE, JudgedGroup, plan_of
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "qwen2_5_32b" / "fipo.yaml"
PROMPT_TOKENS = 200
MEAN_TOKENS = 10_000
SD_BETWEEN_PROMPTS, SD_WITHIN, WRONG_IS_LONGER, MIXED_SHARE = 0.5, 0.4, 1.28, 0.5
VERSION = 3
_VOCABULARY = 152_064


def recipe(divisor: int, tp: int, cp: int, changes: Sequence[str] = ()) -> Config:
    """The recipe's configuration for responses of 1/divisor of their tokens, on layouts of tp × cp."""
    whole = load_config(RECIPE)
    response_tokens = whole.rollout.max_response_tokens // divisor
    return load_config(
        RECIPE,
        [
            f"rollout.max_response_tokens={response_tokens}",
            f"reward.overlong_buffer_tokens={whole.reward.overlong_buffer_tokens // divisor}",
            f"batch.max_tokens_per_microbatch={response_tokens + whole.rollout.max_prompt_tokens}",
            f"parallel.tp={tp}",
            f"parallel.cp={cp}",
            *changes,
        ],
    )


class Responses:
    """All responses that a step generates.

    Lengths are log-normal, with a standard deviation of 0.5 between prompts and 0.4 within one; wrong answers are 28 %
    longer; all are clipped at the longest response, and their mean is 10,000 tokens before they are divided. Half of
    the prompts have right and wrong answers.

    Attributes:
        lengths: tokens of each response [prompt, sample].
        is_right: bool [prompt, sample].
    """

    def __init__(self, config: Config, divisor: int) -> None:
        rollout, rng = config.rollout, np.random.default_rng(0)
        assert rollout.num_prompts_per_round is not None
        prompts, samples = shape = rollout.num_prompts_per_round, rollout.num_samples_per_prompt
        is_mixed = rng.random(prompts) < MIXED_SHARE
        all_or_none = np.where(rng.random(prompts) < 0.5, samples, 0)
        num_right = np.where(is_mixed, rng.integers(1, samples, prompts), all_or_none)
        self.is_right = rng.random(shape).argsort(axis=1) < num_right[:, None]
        spread = SD_BETWEEN_PROMPTS * rng.standard_normal((prompts, 1)) + SD_WITHIN * rng.standard_normal(shape)
        spread += math.log(WRONG_IS_LONGER) * ~self.is_right
        longest = rollout.max_response_tokens * divisor
        self.lengths = np.maximum(_with_mean(spread, longest) // divisor, 1)
        self._is_cut = self.lengths >= rollout.max_response_tokens
        self.num_tokens = int(self.lengths.sum())

    def group(self, prompt_id: int) -> Group:
        """All responses to a prompt, judged, with tokens that depend on nothing but prompt and sample."""
        generator = torch.Generator().manual_seed(prompt_id)
        prompt = Prompt(
            prompt_id, "dapo_math", 4 * PROMPT_TOKENS * "x", tuple(range(PROMPT_TOKENS)), "math_answer", "42"
        )
        samples = [
            Trajectory.of_response(
                prompt_id,
                index,
                torch.arange(PROMPT_TOKENS),
                torch.randint(_VOCABULARY, (length,), generator=generator),
                -torch.rand(length, generator=generator),
                "length" if self._is_cut[prompt_id, index] else "stop",
                [(VERSION, 0, length)],
                source=prompt.source,
                accuracy=float(self.is_right[prompt_id, index]),
                answer="42",
            )
            for index, length in enumerate(self.lengths[prompt_id].tolist())
        ]
        return Group(prompt, samples)

    def judged(self, num_leaders: int) -> list[JudgedGroup]:
        """What would be known of the groups without their tokens, if leaders generated for a prompt each in turn."""
        groups = []
        for prompt_id, lengths in enumerate(self.lengths):
            rows = np.zeros(len(lengths), RESPONSE)
            rows["score"], rows["prompt_id"], rows["num_tokens"] = self.is_right[prompt_id], prompt_id, lengths
            rows["num_prompt_tokens"], rows["oldest_version"] = PROMPT_TOKENS, VERSION
            rows["leader"], rows["sample_index"] = prompt_id % num_leaders, np.arange(len(lengths))
            rows["is_truncated"] = self._is_cut[prompt_id]
            groups.append(JudgedGroup("dapo_math", "math_answer", 0, rows))
        return groups


def _with_mean(spread: NDArray[np.float64], longest: int) -> NDArray[np.int64]:
    low, high = 0.0, 2 * math.log(longest)
    for _ in range(60):
        middle = (low + high) / 2
        is_low = np.minimum(np.exp(middle + spread), longest).mean() < MEAN_TOKENS
        low, high = (middle, high) if is_low else (low, middle)
    return np.minimum(np.exp(low + spread), longest).astype(np.int64)


def decide(groups: Sequence[JudgedGroup], config: Config) -> tuple[NDArray[Any], list[int]]:
    """What a step trains on, as the source of synchronous batches decides it: (plan, size of each group)."""
    assign_rewards(groups, config.reward, config.rollout.max_response_tokens)
    sampler = DynamicSampler(config.rollout.num_prompts, config.sampling)
    sampler.start_step(0)
    sampler.add_round(groups)
    taken = sampler.take()
    assign_advantages(taken, config.advantages.estimator)
    return plan_of(taken), [len(group.rows) for group in taken]
