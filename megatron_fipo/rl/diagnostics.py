"""Numbers about a step as a whole: what the rollouts look like, and whether Future-KL sees more than noise."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_fipo.metrics.reductions import Distribution, Last, Mean, Metrics, Std
from megatron_fipo.rl.judged import parts_of
from megatron_fipo.rl.judged_group import RESPONSE, JudgedGroup
from megatron_fipo.verifiers.verdict import metric_part

NUM_LENGTH_BUCKETS = 8
NOISE_DOMINATES_ABOVE = 0.5
"""Noise dominates where the first update's standard deviation exceeds this share of the later updates'."""

LOG_PROB_SHIFT = "policy/log_prob_shift"
FUTURE_KL = "fipo/future_kl"


def rollout_metrics(groups: Sequence[JudgedGroup], max_response_tokens: int) -> Metrics:
    """Rewards, accuracy and response lengths of judged groups, after `assign_rewards`, samples with an error left out.

    Give it all groups that were generated to see the policy, or the batch after dynamic sampling to see what is trained
    on. Counting the same groups on several ranks changes nothing.

    `rollout/accuracy_by_length/<a>_to_<b>` is the accuracy of responses of more than a and at most b tokens, in eighths
    of max_response_tokens; the last one has no upper end.
    """
    rows = np.concatenate([np.empty(0, RESPONSE), *(group.rows[group.judged] for group in groups)])
    rewards = [group.rewards[group.judged] for group in groups if group.rewards is not None]
    lengths = torch.from_numpy(rows["num_tokens"].astype(np.float32))
    correct = torch.from_numpy((rows["score"] == 1.0).astype(np.float64))
    metrics: Metrics = {
        "reward/mean": Mean(sum(np.concatenate([np.empty(0), *rewards]).tolist()), len(rows)),
        "rollout/accuracy/mean": Mean(correct.sum(), len(rows)),
        "rollout/response_tokens": Distribution(lengths),
        "rollout/response_tokens/mean": Mean(lengths.sum(dtype=torch.float64), len(rows)),
        "rollout/truncated_share": Mean(int(rows["is_truncated"].sum()), len(rows)),
    }
    for name, values in parts_of(groups).items():
        metrics[f"reward/verifier/{metric_part(name)}/mean"] = Mean(sum(values), len(values))
    # A response of exactly `end` tokens belongs to the bucket that ends there.
    bounds = [index * max_response_tokens // NUM_LENGTH_BUCKETS for index in range(1, NUM_LENGTH_BUCKETS)]
    buckets = torch.bucketize(lengths, torch.tensor(bounds, dtype=lengths.dtype))
    for index, (low, high) in enumerate(zip([0, *bounds], [*bounds, max_response_tokens], strict=True)):
        inside = buckets == index
        metrics[f"rollout/accuracy_by_length/{low}_to_{high}"] = Mean(correct[inside].sum(), inside.sum())
    return metrics


def advantage_metrics(groups: Sequence[JudgedGroup]) -> Metrics:
    """Advantages of the batch: `advantages/length_weighted_mean` is sum_i sum_t A / sum_i L_i over its responses.

    Group-relative advantages have mean 0; weighted by length they do not, and say which way lengths are pushed.
    """
    of_groups = [group.advantages for group in groups if group.advantages is not None]
    advantages = torch.from_numpy(np.concatenate([np.empty(0), *of_groups]))
    rows = np.concatenate([np.empty(0, RESPONSE), *(group.rows for group in groups)])
    lengths = torch.from_numpy(rows["num_tokens"].astype(np.float64))
    return {
        "advantages/length_weighted_mean": Mean((advantages * lengths).sum(), lengths.sum()),
        "advantages/std": Std(advantages.sum(), advantages.square().sum(), len(advantages)),
    }


@dataclass(frozen=True)
class NoiseFloor:
    """Compares the first update's own forward pass with the later ones."""

    metrics: Metrics
    """noise_floor/<log_prob_shift or future_kl>/{std, absmax, share_of_later_std}, and each shadow objective's
    shadow/<name>/noise_floor/share_of_later_std."""
    warning: str
    """A warning for the user if noise dominates what is trained on, else an empty string."""


def noise_floor(first: Mapping[str, float], later: Mapping[str, float]) -> NoiseFloor:
    """Judge the noise in log-prob shifts and in Future-KL.

    In the first update after a rollout the weights are those that gave the old log-probs, so that every shift is the
    noise of different packing, kernels or precision. Future-KL amplifies it: independent noise 4.9 times at a half-life
    of 32 tokens, a bias 46.7 times.

    Args:
        first: `scalars` of the step's first update, all its microbatches and ranks merged.
        later: `scalars` of the step's other updates, merged likewise; empty if there are none, and then no judgement.

    Raises:
        ValueError: if `first` holds no log-prob shifts.
    """
    if f"{LOG_PROB_SHIFT}/std" not in first:
        raise ValueError(
            f"noise_floor needs the metrics of policy_loss; {LOG_PROB_SHIFT}/std is not among {list(first)}."
        )
    metrics: Metrics = {}
    noisy: list[str] = []
    for area in (LOG_PROB_SHIFT, FUTURE_KL):
        if f"{area}/std" not in first:
            continue
        name = area.split("/")[1]
        std, absmax = first[f"{area}/std"], first[f"{area}/absmax"]
        metrics[f"noise_floor/{name}/std"] = Last(std)
        metrics[f"noise_floor/{name}/absmax"] = Last(absmax)
        if f"{area}/std" not in later:
            continue
        later_std = later[f"{area}/std"]
        share = _share(std, later_std)
        metrics[f"noise_floor/{name}/share_of_later_std"] = Last(share)
        if share > NOISE_DOMINATES_ABOVE:
            noisy.append(f"{name}: std {std:.2e} (largest {absmax:.2e}) before any update, {later_std:.2e} after")
    for area in sorted(first.keys() & later.keys()):
        if shadow := re.fullmatch(r"shadow/([^/]+)/future_kl/std", area):
            share = _share(first[area], later[area])
            metrics[f"shadow/{shadow[1]}/noise_floor/share_of_later_std"] = Last(share)
    return NoiseFloor(metrics, _noise_warning(noisy) if noisy else "")


def _share(std: float, later_std: float) -> float:
    return std / later_std if later_std else float(std > 0)


def _noise_warning(noisy: Sequence[str]) -> str:
    return (
        f"Noise makes up more than {NOISE_DOMINATES_ABOVE:.0%} of what the policy's updates show in "
        + "; ".join(noisy)
        + ". Influence weights then follow rounding, not credit. Use a higher precision (model.dtype), the same "
        "packing for old and current log-probs, or a shorter objective.half_life_tokens."
    )
