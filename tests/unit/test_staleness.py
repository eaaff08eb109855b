"""FIPO where tokens are older than the step: what enters Future-KL, what does not, and the mismatch by version."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fipo import FipoConfig, LossOutput, padded_policy_loss
from megatron_fipo.metrics.reductions import merge, scalars
from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.rollout_correction import metrics_by_version
from megatron_fipo.rl.staleness import staleness_metrics
from megatron_fipo.rl.trajectory import SampleKey, Segment, Trajectory
from tests.losses import CORRECTIONS, packed_loss

PROXIMAL = FipoConfig(influence_min=0.8, influence_max=1.2, safety_ratio=3.0, half_life_tokens=6.0)
BEHAVIOUR = replace(PROXIMAL, future_kl_reference="behaviour")
LENGTHS = (40, 7, 64, 23)
ADVANTAGES = (-0.7, 0.9, -1.1, 0.4)


def batch(drift_per_step: float = 0.05, staleness_steps: int = 2, moved: float = 0.3) -> dict[str, Tensor]:
    """[B, L]. Behaviour drifts from the proximal policy by some amount a token for each step; a few tokens lie beyond
    each threshold, against behaviour other ones than against the proximal policy; the third response is filtered."""
    generator = torch.Generator().manual_seed(7)
    shape = (len(LENGTHS), max(LENGTHS))
    mask = torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None]
    mask[0, 11:15] = False  # a tool's tokens
    proximal = -3 * torch.rand(shape, generator=generator)
    shift = moved * torch.randn(shape, generator=generator)
    drift = staleness_steps * drift_per_step * (1 + torch.randn(shape, generator=generator))
    if moved:
        shift[0, 5], shift[2, 30:32], drift[0, 20], drift[2, 50], drift[3, 3] = 1.5, 3.0, 3.5, -2.9, -25.0
    values = {
        "log_probs": proximal + shift,
        "old_log_probs": proximal,
        "rollout_log_probs": proximal - drift,
    }
    values = {name: torch.where(mask, value, 0.0) for name, value in values.items()}
    return values | {"advantages": torch.tensor(ADVANTAGES), "response_mask": mask}


def losses_of(inputs: dict[str, Tensor], config: FipoConfig) -> dict[str, tuple[LossOutput, Tensor]]:
    """(the loss, F of the response tokens) in the padded form and in the packed one."""
    mask = inputs["response_mask"]
    padded = padded_policy_loss(**inputs, config=config)
    real = torch.arange(mask.shape[1]) < torch.tensor(LENGTHS)[:, None]
    packed = {name: values[real] for name, values in inputs.items() if name != "advantages"}
    packed["advantages"] = torch.repeat_interleave(inputs["advantages"], torch.tensor(LENGTHS))
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0)
    output = packed_loss(cu_seqlens, config, **packed)
    assert padded.future_kl is not None
    assert output.future_kl is not None
    return {
        "padded": (padded, padded.future_kl[mask]),
        "packed": (output, output.future_kl[packed["response_mask"]]),
    }


def written_down(inputs: dict[str, Tensor], config: FipoConfig, sums: str) -> tuple[float, list[float]]:
    """The loss by token mean and F of the response tokens, in Python's floats.

    Args:
        sums: name of the log-probs against which Future-KL sums up.
    """
    gamma, dual_clip = 2.0 ** (-1.0 / config.half_life_tokens), config.dual_clip
    assert dual_clip is not None
    total, count, future = 0.0, 0, []
    for row, advantage in enumerate(inputs["advantages"].tolist()):
        current, proximal, reference = (inputs[name][row].tolist() for name in ("log_probs", "old_log_probs", sums))
        real = [t for t, is_real in enumerate(inputs["response_mask"][row].tolist()) if is_real]
        ratios = {t: math.exp(current[t] - proximal[t]) for t in real}
        summed = {t: min(max(current[t] - reference[t], -20.0), 20.0) for t in real}
        is_kept = sum(advantage < 0 and ratio > dual_clip for ratio in ratios.values()) <= 1
        for t in real:
            terms = [gamma ** (k - t) * summed[k] for k in real if k >= t and math.exp(summed[k]) <= dual_clip]
            future.append(math.fsum(terms))
            weight = min(max(math.exp(future[-1]), config.influence_min), config.influence_max)
            if advantage < 0 and ratios[t] > config.safety_ratio:
                weight = min(max(weight, 0.8), 1.0)
            clipped = min(max(ratios[t], 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
            loss = max(-weight * advantage * ratios[t], -weight * advantage * clipped)
            if advantage < 0:
                loss = min(loss, -weight * advantage * dual_clip)
            if is_kept:
                total, count = total + loss, count + 1
    return total / count, future


def errors(config: FipoConfig, sums: str) -> list[tuple[float, float]]:
    """Of each form: how far its loss and its F lie from what is written down."""
    inputs = batch()
    loss, future = written_down(inputs, config, sums)
    expected = torch.tensor(future, dtype=torch.float64)
    return [
        (abs(float(output.loss_sum / output.normalizer) - loss), float((found.double() - expected).abs().max()))
        for output, found in losses_of(inputs, config).values()
    ]


@pytest.mark.parametrize(("config", "sums"), [(PROXIMAL, "old_log_probs"), (BEHAVIOUR, "rollout_log_probs")])
def test_future_kl_sums_against_the_policy_that_its_key_names(config: FipoConfig, sums: str) -> None:
    for loss_error, future_kl_error in errors(config, sums):
        assert loss_error < 2e-6
        assert future_kl_error < 2e-5
    other = "old_log_probs" if sums == "rollout_log_probs" else "rollout_log_probs"
    for loss_error, future_kl_error in errors(config, other):
        assert loss_error > 1e-3
        assert future_kl_error > 0.1


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("staleness_steps", [0, 1, 2, 4, 64])
def test_with_equal_weights_future_kl_is_zero_at_any_staleness(staleness_steps: int, correction: str) -> None:
    inputs = batch(staleness_steps=staleness_steps, moved=0.0)
    for output, future in losses_of(inputs, replace(PROXIMAL, rollout_correction=correction)).values():
        assert int(future.count_nonzero()) == 0
        assert bool((output.influence_weights == 1).all())
    for output, future in losses_of(inputs, replace(BEHAVIOUR, rollout_correction=correction)).values():
        measured = scalars(output.metrics)
        assert bool(future.count_nonzero()) == bool(staleness_steps)
        if staleness_steps >= 4:
            assert measured["fipo/influence_weight/clipped_share"] > 0.75


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_what_lies_between_behaviour_and_proximal_weighs_the_loss_alone(correction: str) -> None:
    """Other behaviour, other loss and mask; never another F, weight or sequence filter."""
    config = replace(PROXIMAL, rollout_correction=correction, rollout_ratio_min=0.9, rollout_ratio_max=1.1)
    for form, (near, near_future) in losses_of(batch(staleness_steps=0), config).items():
        far, far_future = losses_of(batch(staleness_steps=4), config)[form]
        assert torch.equal(near_future, far_future)
        assert torch.equal(near.influence_weights, far.influence_weights)
        assert near.metrics["fipo/filtered_sequences"].value() == far.metrics["fipo/filtered_sequences"].value() == 1
        assert torch.equal(near.loss_sum, far.loss_sum) == (correction == "none")
        naive = replace(config, future_kl_reference="behaviour")
        ablation, ablation_future = losses_of(batch(staleness_steps=4), naive)[form]
        assert not torch.equal(ablation_future, far_future)
        assert torch.equal(ablation.final_mask, far.final_mask)


def test_a_drift_grows_with_the_length_only_where_behaviour_is_summed() -> None:
    """A bias b a token comes to b / (1 - gamma), 46.7 b at a half-life of 32; a response's last token has b alone."""
    config = replace(PROXIMAL, half_life_tokens=32.0)
    old = torch.full((1, 400), -1.0)
    inputs = {
        "log_probs": old,
        "old_log_probs": old,
        "rollout_log_probs": old - 0.01,
        "advantages": torch.tensor([1.0]),
        "response_mask": torch.ones(1, 400, dtype=torch.bool),
    }
    naive = padded_policy_loss(**inputs, config=replace(config, future_kl_reference="behaviour")).future_kl
    assert naive is not None
    assert float(naive[0, -1]) == pytest.approx(0.01, rel=1e-4)
    assert float(naive[0, 0]) == pytest.approx(0.01 / (1 - 2 ** (-1 / 32)), rel=1e-3)
    sound = padded_policy_loss(**inputs, config=config).future_kl
    assert sound is not None
    assert int(sound.count_nonzero()) == 0


def test_behaviour_needs_its_log_probs() -> None:
    inputs = batch()
    del inputs["rollout_log_probs"]
    with pytest.raises(ValueError, match=r"objective\.future_kl_reference=behaviour needs rollout_log_probs"):
        padded_policy_loss(**inputs, config=BEHAVIOUR)
    padded_policy_loss(**inputs, config=replace(BEHAVIOUR, future_kl=False))  # no Future-KL, nothing to sum up
    padded_policy_loss(**inputs, config=PROXIMAL)


def test_the_mismatch_by_version_by_hand() -> None:
    difference = torch.tensor([0.125, -0.375, 1.0, 3.0, 7.0, 9.0])
    staleness = torch.tensor([0, 0, 1, 4, -1, 2], dtype=torch.int32)
    mask = torch.tensor([True] * 5 + [False])
    measured = scalars(metrics_by_version(difference, staleness, mask))
    assert measured == {
        "mismatch/newest_version/log_prob_difference/mean": -0.125,
        "mismatch/newest_version/log_prob_difference/std": 0.25,
        "mismatch/newest_version/log_prob_difference/absmean": 0.25,
        "mismatch/newest_version/log_prob_difference/absmax": 0.375,
        "mismatch/newest_version/share": 0.4,
        "mismatch/older_versions/log_prob_difference/mean": 2.0,
        "mismatch/older_versions/log_prob_difference/std": 1.0,
        "mismatch/older_versions/log_prob_difference/absmean": 2.0,
        "mismatch/older_versions/log_prob_difference/absmax": 3.0,
        "mismatch/older_versions/share": 0.4,
    }
    parts = [metrics_by_version(difference[part], staleness[part], mask[part]) for part in (slice(2), slice(2, 6))]
    assert scalars(merge(parts)) == measured
    unsplit = scalars(metrics_by_version(difference, torch.zeros_like(staleness), mask))
    assert unsplit["mismatch/newest_version/log_prob_difference/absmean"] == pytest.approx(2.3)
    assert math.isnan(unsplit["mismatch/older_versions/log_prob_difference/absmean"])
    assert unsplit["mismatch/older_versions/log_prob_difference/absmax"] == -math.inf, "the largest of none"


def test_every_token_carries_the_staleness_of_its_segment() -> None:
    """Two tokens of version 3, an answer of the environment's, one token of version 5, one of no version."""
    trajectory = Trajectory(
        SampleKey("sums", 0, 0),
        torch.tensor([11, 12]),
        [
            Segment(torch.tensor([5, 6]), "policy", torch.tensor([-0.5, -0.5]), 3),
            Segment(torch.tensor([7]), "environment"),
            Segment(torch.tensor([8]), "policy", torch.tensor([-0.5]), 5),
            Segment(torch.tensor([1]), "policy", torch.tensor([-0.5])),
        ],
        "stop",
    )
    packed = build_packed_batch([trajectory], [0], 8, 0, version=5)
    assert packed.staleness_steps is not None
    assert packed.staleness_steps.tolist() == [-1, 2, 2, -1, 0, -1, -1, -1]
    assert packed.staleness_steps.dtype == torch.int32
    assert build_packed_batch([trajectory], [0], 8, 0).staleness_steps is None


@pytest.mark.parametrize(("bound", "kept"), [(0, [0, 0, 0, 1, 1]), (1, [0, 0, 0, 1, 1]), (2, [1, 1, 0, 1, 1])])
def test_tokens_beyond_the_bound_are_left_out_of_the_loss(bound: int, kept: list[int]) -> None:
    trajectory = Trajectory(
        SampleKey("sums", 0, 0),
        torch.tensor([11, 12]),
        [
            Segment(torch.tensor([5, 6]), "policy", torch.tensor([-0.5, -0.5]), 3),
            Segment(torch.tensor([7]), "environment"),
            Segment(torch.tensor([8]), "policy", torch.tensor([-0.5]), 5),
            Segment(torch.tensor([1]), "policy", torch.tensor([-0.5])),  # of no version: it cannot be told
        ],
        "stop",
        advantage=2.0,
    )
    whole = build_packed_batch([trajectory], [0], 8, 0, version=5)
    packed = build_packed_batch([trajectory], [0], 8, 0, version=5, max_staleness_steps=bound)
    assert packed.response_mask[1:6].tolist() == [bool(one) for one in kept]
    assert packed.response_token_counts.tolist() == [sum(kept)]
    assert whole.response_mask[1:6].tolist() == [True, True, False, True, True]
    for name in ("input_ids", "labels", "rollout_log_probs", "advantages", "staleness_steps"):
        assert torch.equal(getattr(packed, name), getattr(whole, name))


def test_the_staleness_of_a_batch_by_hand() -> None:
    def sample(*parts: tuple[int, int | None]) -> Trajectory:
        segments = [
            Segment(torch.zeros(count, dtype=torch.int64), "policy", torch.zeros(count), version)
            for count, version in parts
        ]
        return Trajectory(SampleKey("sums", 0, 0), torch.tensor([11]), segments, "stop")

    found = staleness_metrics([sample((4, 3), (2, 5)), sample((3, 4)), sample((9, None))], version=5)
    assert scalars(found) == {
        "rollout/staleness_steps/mean": pytest.approx((4 * 2 + 3 * 1) / 9),
        "rollout/staleness_steps/max": 2.0,
    }
    assert staleness_metrics([sample((9, None))], version=5) == {}
