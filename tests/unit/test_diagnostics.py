"""Rollout and advantage metrics by hand, and the judgement of the noise floor."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_fipo.config import FipoConfig, RewardSection
from megatron_fipo.metrics.reductions import merge, scalars
from megatron_fipo.rl.advantages import assign_advantages, assign_rewards
from megatron_fipo.rl.diagnostics import advantage_metrics, noise_floor, rollout_metrics
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.objective import policy_loss
from tests.unit.rl_samples import make_judged


def judged() -> list[JudgedGroup]:
    groups = [
        make_judged(0, (1.0, 0.0, 0.0, 0.0), lengths=(2, 4, 6, 16)),
        make_judged(1, (1.0, 1.0, 0.5, 0.0), lengths=(8, 9, 10, 16)),
    ]
    groups[0].rows["is_truncated"][3] = groups[1].rows["is_truncated"][3] = True
    assign_rewards(groups, RewardSection(), max_response_tokens=16)
    assign_advantages(groups, "group_mean")
    return groups


def test_rollout_metrics_by_hand() -> None:
    measured = scalars(rollout_metrics(judged(), max_response_tokens=16))
    assert measured["reward/mean"] == (3 - 5) / 8
    assert measured["rollout/accuracy/mean"] == 3 / 8
    assert measured["rollout/truncated_share"] == 2 / 8
    assert measured["rollout/response_tokens/mean"] == 71 / 8
    lengths = torch.tensor([2, 4, 6, 16, 8, 9, 10, 16], dtype=torch.float64)
    for name, q in (("min", 0), ("p25", 0.25), ("median", 0.5), ("p75", 0.75), ("max", 1)):
        assert measured[f"rollout/response_tokens/{name}"] == float(lengths.quantile(q))
    buckets = {name.rsplit("/")[-1]: value for name, value in measured.items() if "accuracy_by_length" in name}
    assert list(buckets) == [f"{low}_to_{low + 2}" for low in range(0, 16, 2)]
    assert buckets["0_to_2"] == 1.0
    assert buckets["2_to_4"] == 0.0
    assert buckets["6_to_8"] == 1.0
    assert buckets["8_to_10"] == 0.5
    assert buckets["14_to_16"] == 0.0
    assert math.isnan(buckets["10_to_12"])


def test_samples_without_a_verdict_are_left_out() -> None:
    groups = judged()
    groups[0].rows["has_failed"][0] = True
    groups[0].errors[0] = "no verdict"
    measured = scalars(rollout_metrics(groups, max_response_tokens=16))
    assert measured["rollout/accuracy/mean"] == 2 / 7
    assert measured["rollout/response_tokens/min"] == 4


def test_ranks_merge_to_the_whole() -> None:
    groups = judged()
    whole = scalars(rollout_metrics(groups, 16) | advantage_metrics(groups))
    halves = merge([rollout_metrics([group], 16) | advantage_metrics([group]) for group in groups])
    assert scalars(halves) == pytest.approx(whole, nan_ok=True)
    twice = merge([rollout_metrics(groups, 16), rollout_metrics(groups, 16)])
    assert scalars(twice)["rollout/accuracy/mean"] == whole["rollout/accuracy/mean"]


def test_length_weighted_advantage() -> None:
    measured = scalars(advantage_metrics(judged()))
    # First group: mean reward -0.5, advantages 1.5 and -0.5; second: mean 0, advantages 1, 1, -1, -1.
    expected = (1.5 * 2 - 0.5 * (4 + 6 + 16) + 8 + 9 - 10 - 16) / 71
    assert measured["advantages/length_weighted_mean"] == pytest.approx(expected)
    assert measured["advantages/std"] == pytest.approx(math.sqrt((1.5**2 + 3 * 0.25 + 4) / 8))


def update(shift: torch.Tensor, config: FipoConfig) -> dict[str, float]:
    size = len(shift)
    output = policy_loss(
        shift,
        torch.zeros(size),
        torch.ones(size),
        torch.ones(size, dtype=torch.bool),
        torch.tensor([0, size]),
        config,
    )
    return scalars(output.metrics)


def test_noise_floor() -> None:
    noise = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    first = update(1e-4 * noise, FipoConfig())
    quiet = noise_floor(first, update(1e-2 * noise, FipoConfig()))
    assert quiet.warning == ""
    values = scalars(quiet.metrics)
    assert values["noise_floor/log_prob_shift/std"] == pytest.approx(1e-4, rel=0.05)
    # Independent noise grows by 1 / sqrt(1 - gamma^2) = 4.9 at a half-life of 32.
    amplification = values["noise_floor/future_kl/std"] / values["noise_floor/log_prob_shift/std"]
    assert amplification == pytest.approx(4.9, rel=0.15)
    assert values["noise_floor/future_kl/share_of_later_std"] == pytest.approx(0.01, rel=1e-3)
    assert values["noise_floor/log_prob_shift/absmax"] == pytest.approx(float(1e-4 * noise.abs().max()), rel=1e-5)
    loud = noise_floor(first, update(1.5e-4 * noise, FipoConfig()))
    assert "future_kl: std" in loud.warning
    assert "log_prob_shift: std" in loud.warning
    assert "half_life_tokens" in loud.warning


def test_noise_floor_without_later_updates_or_future_kl() -> None:
    shift = torch.full((50,), 1e-3)
    alone = noise_floor(update(shift, FipoConfig()), {})
    assert alone.warning == ""
    assert "noise_floor/future_kl/share_of_later_std" not in alone.metrics
    dapo = FipoConfig(future_kl=False)
    assert not [name for name in noise_floor(update(shift, dapo), {}).metrics if "future_kl" in name]
    with pytest.raises(ValueError, match="needs the metrics of policy_loss"):
        noise_floor({}, {})


def test_exactly_on_policy_is_no_noise() -> None:
    zero = update(torch.zeros(10), FipoConfig())
    assert noise_floor(zero, zero).warning == ""
