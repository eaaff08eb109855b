"""The loss: hand-computed values, aggregation over parts, gradients, metrics, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.metrics.reductions import merge, scalars
from megatron_fipo.rl import objective
from megatron_fipo.rl.future_kl import future_kl
from megatron_fipo.rl.objective import (
    LossOutput,
    influence_weights,
    log_prob_shift,
    policy_loss,
    reference_kl,
)
from megatron_fipo.rl.objective_metrics import HISTOGRAM_SCALE, shift_histograms
from megatron_fipo.rl.sequences import WholeSequences, count_per_sequence, sequence_ids_of
from megatron_fipo.rl.token_values import TokenValues
from tests.losses import packed_loss

FIPO = FipoConfig(influence_min=0.8, influence_max=1.2, safety_ratio=3.0)
DAPO = FipoConfig(future_kl=False)
AGGREGATIONS = {
    "token_mean": FIPO,
    "sequence_mean": replace(FIPO, loss_aggregation="sequence_mean"),
    "sequence_sum": replace(FIPO, loss_aggregation="sequence_sum", sequence_sum_tokens=64),
}

ONE_TOKEN = WholeSequences(torch.tensor([0, 1]))


def batch(lengths: tuple[int, ...] = (24, 8, 40, 16), seed: int = 0) -> dict[str, Tensor]:
    """A packed batch with shifts from tiny to beyond every threshold. The second sequence is dropped by the filter,
    the last has no response tokens."""
    generator = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    num_tokens = int(cu[-1])
    ids = sequence_ids_of(cu, num_tokens, torch.device("cpu"))
    old = -torch.rand(num_tokens, generator=generator) * 3
    shift = 0.3 * torch.randn(num_tokens, generator=generator)
    shift[5] = 1.5
    shift[25:28] = 3.0
    advantages = torch.tensor([-0.7, -1.1, 0.9, 0.4])[ids]
    mask = torch.rand(num_tokens, generator=generator) < 0.8
    mask[25:28] = True
    mask[cu[-2] :] = False
    return {
        "log_probs": old + shift,
        "old_log_probs": old,
        "advantages": advantages,
        "response_mask": mask,
        "cu_seqlens": cu,
    }


def zigzag_rows(cu: Tensor, cp: int, rank: int) -> Tensor:
    """Rows of context-parallel rank `rank`: chunks rank and 2 * cp - 1 - rank of every sequence."""
    rows = []
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        chunks = torch.arange(start, end).chunk(2 * cp)
        rows += [chunks[rank], chunks[2 * cp - 1 - rank]]
    return torch.cat(rows)


def test_first_update_is_dapo() -> None:
    inputs = batch()
    inputs["log_probs"] = inputs["old_log_probs"].clone()
    fipo, dapo = (packed_loss(**inputs, config=config) for config in (FIPO, DAPO))
    assert torch.equal(fipo.loss_sum, dapo.loss_sum)
    assert bool((fipo.influence_weights == 1).all())
    # On-policy the loss is minus the sum of advantages over response tokens.
    expected = -float(inputs["advantages"][inputs["response_mask"]].sum())
    assert float(fipo.loss_sum) == pytest.approx(expected, rel=1e-6)


def test_hand_computed_loss() -> None:
    """gamma 1/2, one sequence of three tokens and one of two; weights in [0.8, 1.2]."""
    config = replace(FIPO, half_life_tokens=1.0)
    shift = torch.tensor([0.0, 0.1, 0.2, math.log(4.0), -0.4])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    log_probs = shift.clone().requires_grad_()
    tokens = TokenValues(log_probs, torch.zeros(5), advantages, torch.tensor([True, True, False, True, True]))
    output = policy_loss(tokens, WholeSequences(torch.tensor([0, 3, 5])), config)
    # The third token is masked: F = [0.05, 0.1, 0], and [log 4 - 0.2, -0.4] in the second sequence.
    assert output.future_kl is not None
    assert output.future_kl.tolist() == pytest.approx([0.05, 0.1, 0.0, math.log(4) - 0.2, -0.4], abs=1e-6)
    # exp(log 4 - 0.2) is cut to 1.2, then to 1.0 because the advantage is negative and 4 > safety_ratio.
    weights = [math.exp(0.05), math.exp(0.1), 1.0, 1.0, 0.8]
    assert output.influence_weights.tolist() == pytest.approx(weights, abs=1e-6)
    # Negative advantage, ratio exp(-0.4) = 0.67 < 0.8: the clipped branch, 0.8 * 0.8.
    losses = [-math.exp(0.05), -math.exp(0.1) * math.exp(0.1), -math.exp(0.2), 4.0, 0.64]
    assert output.token_loss.tolist() == pytest.approx(losses, abs=1e-5)
    assert int(output.normalizer) == 4
    assert float(output.loss_sum.detach()) == pytest.approx(sum(losses) - losses[2], abs=1e-5)
    output.loss_sum.backward()
    assert log_probs.grad is not None
    assert log_probs.grad.tolist() == pytest.approx([losses[0], losses[1], 0.0, 4.0, 0.0], abs=1e-5)


@pytest.mark.parametrize(
    ("shift", "advantage", "loss", "slope"),
    [
        (math.log(1.28) + 0.1, 1.0, -1.28, 0.0),  # clipped above
        (math.log(0.5), 1.0, -0.5, -0.5),  # not clipped below with a positive advantage
        (math.log(0.5), -1.0, 0.8, 0.0),  # clipped below with a negative one
        (math.log(5.0), -1.0, 5.0, 5.0),  # negative, not yet dual-clipped
        (math.log(20.0), -1.0, 10.0, 0.0),  # dual clip
        (25.0, -1.0, 10.0, 0.0),  # beyond the clamp of the shift
    ],
)
def test_branches_of_the_clipped_loss(shift: float, advantage: float, loss: float, slope: float) -> None:
    log_probs = torch.tensor([shift], requires_grad=True)
    tokens = TokenValues(log_probs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1, dtype=torch.bool))
    output = policy_loss(tokens, ONE_TOKEN, DAPO)
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == pytest.approx(loss, rel=1e-5)
    assert log_probs.grad is not None
    assert float(log_probs.grad) == pytest.approx(slope, rel=1e-5)


def test_without_dual_clip_the_loss_grows_on() -> None:
    log_probs, mask = torch.tensor([math.log(20.0)]), torch.ones(1, dtype=torch.bool)
    tokens = TokenValues(log_probs, torch.zeros(1), torch.tensor([-1.0]), mask)
    output = policy_loss(tokens, ONE_TOKEN, replace(DAPO, dual_clip=None))
    assert float(output.loss_sum) == pytest.approx(20.0, rel=1e-5)
    assert "policy/dual_clip_fraction" not in output.metrics


def test_safety_clip_only_lowers_negative_tokens_of_large_ratio() -> None:
    future_kl_values = torch.tensor([0.5, 0.5, 0.5, -0.5])
    ratio, advantages = torch.tensor([4.0, 4.0, 2.0, 4.0]), torch.tensor([-1.0, 1.0, -1.0, -1.0])
    config = replace(FIPO, influence_min=0.5, influence_max=1.5)
    weights = influence_weights(future_kl_values, ratio, advantages, config)
    assert weights.tolist() == pytest.approx([1.0, 1.5, 1.5, 0.8])


def test_the_filter_drops_whole_sequences() -> None:
    inputs = batch()
    output = packed_loss(**inputs, config=FIPO)
    cu, mask = inputs["cu_seqlens"], inputs["response_mask"]
    assert not output.final_mask[cu[1] : cu[2]].any()
    assert torch.equal(output.final_mask[: cu[1]], mask[: cu[1]])
    assert int(output.normalizer) == int(mask.sum() - mask[cu[1] : cu[2]].sum())
    assert scalars(output.metrics)["fipo/filtered_sequences"] == 1
    kept = packed_loss(**inputs, config=replace(FIPO, max_dual_clipped_tokens=3))
    assert torch.equal(kept.final_mask, mask)


def test_normalizers_and_weights_of_the_aggregations() -> None:
    inputs = batch()
    by_token = packed_loss(**inputs, config=FIPO)
    cu, losses, mask = inputs["cu_seqlens"], by_token.token_loss, by_token.final_mask
    first, third = (losses[cu[i] : cu[i + 1]][mask[cu[i] : cu[i + 1]]] for i in (0, 2))
    by_sequence = packed_loss(**inputs, config=AGGREGATIONS["sequence_mean"])
    # One sequence is filtered and one holds no response token.
    assert int(by_sequence.normalizer) == 2
    assert float(by_sequence.loss_sum) == pytest.approx(float(first.mean() + third.mean()), rel=1e-5)
    constant = packed_loss(**inputs, config=AGGREGATIONS["sequence_sum"])
    assert int(constant.normalizer) == 2 * 64
    assert float(constant.loss_sum) == pytest.approx(float(first.sum() + third.sum()), rel=1e-5)
    assert constant.normalizer.dtype == by_token.normalizer.dtype == torch.int64


class Shard:
    """A rank's rows of sequences; their suffix sum sees the rows of all ranks, once each has shown its own."""

    def __init__(self, inputs: dict[str, Tensor], cp: int, rank: int, seen: dict[str, Tensor]) -> None:
        self.cu, self.seen = inputs["cu_seqlens"], seen
        self.whole_ids = sequence_ids_of(self.cu, int(self.cu[-1]), torch.device("cpu"))
        self.rows = zigzag_rows(self.cu, cp, rank)
        self.ids, self.num, self.counts_here = self.whole_ids[self.rows], len(self.cu) - 1, rank == 0
        self.response_tokens = count_per_sequence(inputs["response_mask"], self.whole_ids, self.num)

    def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
        self.seen["x"][self.rows], self.seen["flags"][self.rows] = x, flags
        counts = count_per_sequence(self.seen["flags"], self.whole_ids, self.num)
        return future_kl(self.seen["x"], self.cu, half_life_tokens)[self.rows], counts

    def total(self, per_sequence: Tensor) -> Tensor:
        raise AssertionError("the response's tokens are known, and there is no correction")


def sharded(inputs: dict[str, Tensor], config: FipoConfig, cp: int) -> list[tuple[Tensor, LossOutput, Tensor]]:
    """(rows, output, gradient) of each context-parallel rank."""
    num_tokens = int(inputs["cu_seqlens"][-1])
    seen = {"x": torch.zeros(num_tokens), "flags": torch.zeros(num_tokens, dtype=torch.bool)}
    for _ in ("every rank shows its rows", "and has those of all"):
        results = []
        for rank in range(cp):
            shard = Shard(inputs, cp, rank, seen)
            log_probs = inputs["log_probs"][shard.rows].requires_grad_()
            tokens = TokenValues(
                log_probs, *(inputs[name][shard.rows] for name in ("old_log_probs", "advantages", "response_mask"))
            )
            output = policy_loss(tokens, shard, config)
            output.loss_sum.backward()
            assert log_probs.grad is not None
            results.append((shard.rows, output, log_probs.grad))
    return results


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("config", AGGREGATIONS.values(), ids=AGGREGATIONS.keys())
def test_shards_add_up_to_the_whole(config: FipoConfig, cp: int) -> None:
    inputs = batch()
    log_probs = inputs["log_probs"].clone().requires_grad_()
    whole = packed_loss(**{**inputs, "log_probs": log_probs}, config=config)
    whole.loss_sum.backward()
    parts = sharded(inputs, config, cp)
    loss_sum = sum(float(output.loss_sum.detach()) for _, output, _ in parts)
    assert loss_sum == pytest.approx(float(whole.loss_sum.detach()), rel=1e-6)
    assert sum(int(output.normalizer) for _, output, _ in parts) == int(whole.normalizer)
    gradient = torch.zeros_like(log_probs)
    for rows, _, part in parts:
        gradient[rows] = part
    assert log_probs.grad is not None
    assert torch.allclose(gradient, log_probs.grad, rtol=1e-6, atol=1e-7)
    merged, expected = scalars(merge([output.metrics for _, output, _ in parts])), scalars(whole.metrics)
    assert merged.keys() == expected.keys()
    assert merged == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_microbatches_add_up_to_the_minibatch() -> None:
    inputs = batch()
    whole = packed_loss(**inputs, config=FIPO)
    cu = inputs["cu_seqlens"]
    parts = []
    for first, last in ((0, 1), (1, 4)):
        rows = slice(int(cu[first]), int(cu[last]))
        tokens = {name: value[rows] for name, value in inputs.items() if name != "cu_seqlens"}
        parts.append(packed_loss(**tokens, cu_seqlens=cu[first : last + 1] - cu[first], config=FIPO))
    assert float(parts[0].loss_sum + parts[1].loss_sum) == pytest.approx(float(whole.loss_sum), rel=1e-6)
    assert int(parts[0].normalizer + parts[1].normalizer) == int(whole.normalizer)
    merged = scalars(merge([part.metrics for part in parts]))
    assert merged == pytest.approx(scalars(whole.metrics), rel=1e-6, nan_ok=True)
    averaged = [scalars(part.metrics)["policy/kl/mean"] for part in parts]
    assert sum(averaged) / 2 != pytest.approx(merged["policy/kl/mean"], rel=1e-3)


@pytest.mark.parametrize("config", [*AGGREGATIONS.values(), DAPO], ids=[*AGGREGATIONS, "dapo"])
def test_an_empty_mask_gives_zero_with_a_graph(config: FipoConfig) -> None:
    inputs = batch()
    log_probs = inputs["log_probs"].clone().requires_grad_()
    mask = torch.zeros_like(inputs["response_mask"])
    output = packed_loss(**{**inputs, "log_probs": log_probs, "response_mask": mask}, config=config)
    output.loss_sum.backward()
    assert float(output.loss_sum.detach()) == 0.0
    assert int(output.normalizer) == 0
    assert log_probs.grad is not None
    assert not log_probs.grad.any()
    assert math.isnan(scalars(output.metrics)["policy/kl/mean"])


def test_bfloat16_log_probs_are_raised_to_float32() -> None:
    inputs = batch()
    inputs["log_probs"] = inputs["log_probs"].bfloat16()
    output = packed_loss(**inputs, config=FIPO)
    assert output.loss_sum.dtype == torch.float32
    same = packed_loss(**{**inputs, "log_probs": inputs["log_probs"].float()}, config=FIPO)
    assert torch.equal(output.loss_sum, same.loss_sum)


def test_future_kl_and_weights_carry_no_gradient() -> None:
    """With the weights as constants, the gradient of an unclipped token is its loss; F's own slope must not enter."""
    inputs = batch()
    log_probs = inputs["log_probs"].clone().requires_grad_()
    output = packed_loss(**{**inputs, "log_probs": log_probs}, config=FIPO)
    output.loss_sum.backward()
    assert log_probs.grad is not None
    assert not output.influence_weights.requires_grad
    ratio = (inputs["log_probs"] - inputs["old_log_probs"]).exp()
    inside = output.final_mask & (ratio > 0.81) & (ratio < 1.27)
    assert torch.allclose(log_probs.grad[inside], output.token_loss[inside], rtol=1e-5)


def test_kl_penalty_and_entropy_bonus() -> None:
    inputs = batch()
    reference = inputs["old_log_probs"] - 0.1
    entropy = torch.rand(len(reference), requires_grad=True)
    extras = {"reference_log_probs": reference, "entropy": entropy}
    plain = packed_loss(**inputs, config=FIPO, **extras)
    both = packed_loss(**inputs, config=replace(FIPO, kl_coefficient=0.5, entropy_coefficient=0.25), **extras)
    difference = reference - inputs["log_probs"]
    k3 = (difference.exp() - difference - 1)[plain.final_mask].sum()
    bonus = entropy.detach()[plain.final_mask].sum()
    expected = float(plain.loss_sum + 0.5 * k3 - 0.25 * bonus)
    assert float(both.loss_sum.detach()) == pytest.approx(expected, rel=1e-5)
    both.loss_sum.backward()
    assert entropy.grad is not None
    assert torch.equal(entropy.grad, torch.where(plain.final_mask, -0.25, 0.0))
    measured, mask = scalars(both.metrics), inputs["response_mask"]
    assert measured["policy/entropy/mean"] == pytest.approx(float(entropy.detach()[mask].mean()), rel=1e-5)
    assert measured["policy/reference_kl/mean"] > 0


def test_reference_kl_vanishes_only_where_the_policies_agree() -> None:
    values = reference_kl(torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -1.5, -0.5]))
    assert values.tolist() == pytest.approx([0.0, math.exp(-0.5) - 0.5, math.exp(0.5) - 1.5], abs=1e-6)
    assert bool((values[1:] > 0).all())


def test_log_prob_shift_is_clamped() -> None:
    assert log_prob_shift(torch.tensor([-1.0, 50.0]), torch.tensor([-0.5, 0.0])).tolist() == [-0.5, 20.0]


def test_metrics_by_hand() -> None:
    ratios = torch.tensor([2.0, 2.9, 3.5, 5.0, 12.0, 1.0, 1.5, 1e-4, 7.0])
    advantages = torch.tensor([-1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0])
    mask = torch.tensor([True] * 8 + [False])
    config = replace(FIPO, influence_min=0.5, influence_max=1.5, max_dual_clipped_tokens=5)
    tokens = TokenValues(ratios.log(), torch.zeros(9), advantages, mask)
    output = policy_loss(tokens, WholeSequences(torch.tensor([0, 5, 9])), config)
    measured = scalars(output.metrics)
    assert measured["policy/response_tokens"] == 8
    assert measured["policy/ratio_negative/share_2_to_3"] == 2 / 8
    assert measured["policy/ratio_negative/share_3_to_4"] == 1 / 8
    assert measured["policy/ratio_negative/share_4_to_dual_clip"] == 1 / 8
    assert measured["policy/dual_clip_fraction"] == 1 / 8
    assert measured["policy/clip_fraction"] == 1 / 8
    assert measured["policy/ratio_negative/max"] == pytest.approx(12, rel=1e-6)
    assert measured["policy/ratio_positive/min"] == pytest.approx(1e-4, rel=1e-5)
    assert measured["policy/ratio_positive/max"] == pytest.approx(1.5, rel=1e-6)
    assert measured["policy/ratio_positive/share_below_1e-3"] == pytest.approx(1 / 3)
    assert measured["policy/kl/mean"] == pytest.approx(-float(ratios[:8].log().mean()), rel=1e-5)
    shift = ratios[:8].double().log()
    assert measured["policy/log_prob_shift/std"] == pytest.approx(float(shift.std(correction=0)), rel=1e-5)
    assert measured["policy/log_prob_shift/absmax"] == pytest.approx(-math.log(1e-4), rel=1e-5)
    assert output.future_kl is not None
    exp_future_kl, weights = output.future_kl[:8].double().exp(), output.influence_weights[:8].double()
    assert measured["fipo/exp_future_kl/mean"] == pytest.approx(float(exp_future_kl.mean()), rel=1e-5)
    assert measured["fipo/exp_future_kl/max"] == pytest.approx(float(exp_future_kl.max()), rel=1e-5)
    assert measured["fipo/exp_future_kl/min"] == pytest.approx(float(exp_future_kl.min()), rel=1e-5)
    outside = ((exp_future_kl > 1.5) | (exp_future_kl < 0.5)).double().mean()
    assert measured["fipo/influence_weight/clipped_share"] == pytest.approx(float(outside))
    assert measured["fipo/influence_weight/std"] == pytest.approx(float(weights.std(correction=0)), rel=1e-5)
    assert measured["fipo/influence_weight/min"] == 0.5
    # Three of five negative tokens are above safety_ratio and come down to 1.0: not "clipped high" any more.
    assert measured["fipo/influence_weight/max"] == 1.5
    high = (weights >= 1.5).double().mean()
    assert measured["fipo/influence_weight/clipped_high_share"] == pytest.approx(float(high))
    assert float(outside) > float(high)


def test_dapo_reports_nothing_of_fipo() -> None:
    output = packed_loss(**batch(), config=DAPO)
    assert not [name for name in output.metrics if name.startswith("fipo/")]
    assert output.future_kl is None


def test_histogram_quantiles_against_the_values() -> None:
    """About 1 % relative to the shift, over seven orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    magnitude = 10 ** (torch.rand(20001, generator=generator) * 7 - 6)
    shift = torch.where(torch.rand(20001, generator=generator) < 0.5, magnitude, -magnitude)
    everywhere = torch.ones_like(shift, dtype=torch.bool)
    histogram, empty = shift_histograms(shift, everywhere, ~everywhere)
    for q in (0.01, 0.25, 0.4, 0.6, 0.75, 0.995, 0.999):
        exact = float(shift.double().quantile(q))
        assert math.log(histogram.quantile(q)) == pytest.approx(exact, rel=0.015, abs=HISTOGRAM_SCALE), q
    assert float(histogram.counts.sum()) == 20001
    assert math.isnan(empty.quantile(0.5))


def test_histogram_puts_each_value_between_its_edges() -> None:
    _, empty = shift_histograms(torch.zeros(1), torch.ones(1, dtype=torch.bool), torch.zeros(1, dtype=torch.bool))
    centres = ((empty.edges[1:] + empty.edges[:-1]) / 2).float()
    everywhere = torch.ones_like(centres, dtype=torch.bool)
    assert bool((shift_histograms(centres, everywhere, ~everywhere)[0].counts == 1).all())


def test_histogram_holds_the_extremes_and_zero() -> None:
    shift = torch.tensor([-20.0, 0.0, 0.0, 20.0])
    histogram, _ = shift_histograms(shift, torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool))
    assert float(histogram.counts.sum()) == 4
    assert histogram.quantile(0.5) == pytest.approx(1.0, abs=1e-7)
    assert histogram.quantile(1.0) == pytest.approx(math.exp(20), rel=0.25)


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({"advantages": torch.zeros(3)}, FIPO, r"advantages has shape \(3,\) but log_probs \(88,\)"),
        ({"advantages": torch.zeros(88, device="meta")}, FIPO, "advantages lies on meta but log_probs on cpu"),
        ({"response_mask": torch.ones(88)}, FIPO, "response_mask must be bool; it is torch.float32"),
        ({"log_probs": torch.zeros(0)}, FIPO, "at least one token"),
        ({"cu_seqlens": torch.tensor([0, 44])}, FIPO, "sequences have 44 tokens on this rank but log_probs 88"),
        ({"cu_seqlens": torch.tensor([0, 90, 88])}, FIPO, "must not descend; entry 2 is 88 after 90"),
        ({"cu_seqlens": torch.tensor([44, 88])}, FIPO, "from 44 to 88 but must run from 0"),
        ({"cu_seqlens": torch.tensor(88)}, FIPO, "must be a vector of integers"),
        ({}, replace(FIPO, dual_clip=None), r"objective.dual_clip=null: .* Set objective.dual_clip=10\."),
        ({}, replace(FIPO, half_life_tokens=0.0), "objective.half_life_tokens=0.0: must be above 0"),
        (
            {},
            replace(FIPO, influence_min=1.3),
            "objective.influence_min=1.3: must not be above",
        ),
        ({}, replace(FIPO, kl_coefficient=0.1), "kl_coefficient=0.1 needs reference_log_probs"),
        ({}, replace(FIPO, entropy_coefficient=0.1), "entropy_coefficient=0.1 needs entropy"),
        ({}, replace(FIPO, loss_aggregation="mean"), "loss_aggregation=mean: must be one of token_mean, sequence_mean"),
        ({}, replace(FIPO, loss_aggregation="sequence_sum"), "objective.sequence_sum_tokens=null: .* constant length"),
    ],
)
def test_refuses(changes: dict[str, Tensor], config: FipoConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_loss(**{**batch(), **changes}, config=config)


def test_refuses_what_is_neither_call() -> None:
    tokens = TokenValues(torch.zeros(1), torch.zeros(1), torch.ones(1), torch.ones(1, dtype=torch.bool))
    with pytest.raises(TypeError, match="takes TokenValues, not list, as its first argument"):
        policy_loss([0.0], ONE_TOKEN, FIPO)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"Sequences, not a tensor, .*: WholeSequences\(cu_seqlens, log_probs.device\)"):
        policy_loss(tokens, torch.tensor([0, 1]), FIPO)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the sequences were made for meta but log_probs lie on cpu"):
        policy_loss(tokens, WholeSequences(torch.tensor([0, 1]), "meta"), FIPO)


def test_a_sound_objective_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each microbatch of a run would check the same one again."""
    checked = []
    monkeypatch.setattr(objective, "check_objective", checked.append)
    for _ in range(3):
        packed_loss(**batch(), config=replace(FIPO, half_life_tokens=7.125))
    assert len(checked) == 1
