"""The mismatch between actor and rollout engine, and its corrections: by hand, over shards, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.metrics.reductions import merge, scalars
from megatron_fipo.rl import rollout_correction
from megatron_fipo.rl.objective import LossOutput, policy_loss
from megatron_fipo.rl.rollout_correction import log_prob_difference, mismatch_metrics
from megatron_fipo.rl.sequences import count_per_sequence, sequence_ids_of
from megatron_fipo.rl.token_values import TokenValues
from tests.losses import CORRECTIONS, packed_loss

DAPO = FipoConfig(future_kl=False)
RATIOS = torch.tensor([1.0, 1.1, 3.0, 0.4, 0.5, 4.0, 1.0, 9.0])
"""pi_old / mu of the tokens of `small_batch`; the last one is masked."""
LENGTHS = (3, 3, 2)


def small_batch() -> dict[str, Tensor]:
    """Three responses, on-policy within the actor: the loss of a token is -A times its weight."""
    old = torch.full((8,), -1.5)
    return {
        "log_probs": old.clone(),
        "old_log_probs": old,
        "rollout_log_probs": old - RATIOS.log(),
        "advantages": torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0, -2.0, 0.5, 0.5]),
        "response_mask": torch.tensor([True] * 7 + [False]),
        "cu_seqlens": torch.tensor([0, 3, 6, 8]),
    }


def with_correction(kind: str, low: float = 0.5, high: float = 2.0, **changes: object) -> FipoConfig:
    return replace(DAPO, rollout_correction=kind, rollout_ratio_min=low, rollout_ratio_max=high, **changes)  # type: ignore[arg-type]


def test_mismatch_by_hand() -> None:
    batch = small_batch()
    difference = log_prob_difference(batch["old_log_probs"], batch["rollout_log_probs"])
    measured = scalars(mismatch_metrics(difference, batch["rollout_log_probs"], batch["response_mask"]))
    ratios = [float(ratio) for ratio in RATIOS[:7]]
    logs = [math.log(ratio) for ratio in ratios]
    assert measured["mismatch/log_prob_difference/mean"] == pytest.approx(sum(logs) / 7, rel=1e-5)
    assert measured["mismatch/log_prob_difference/absmean"] == pytest.approx(sum(map(abs, logs)) / 7, rel=1e-5)
    assert measured["mismatch/log_prob_difference/absmax"] == pytest.approx(math.log(4), rel=1e-5)
    deviation = torch.tensor(logs, dtype=torch.float64).std(correction=0)
    assert measured["mismatch/log_prob_difference/std"] == pytest.approx(float(deviation), rel=1e-5)
    assert measured["mismatch/kl_k1/mean"] == pytest.approx(-sum(logs) / 7, rel=1e-5)
    k3 = sum(ratio - 1 - math.log(ratio) for ratio in ratios) / 7
    assert measured["mismatch/kl/mean"] == pytest.approx(k3, rel=1e-5)
    # mu = exp(-1.5) / ratio, so that pi - mu = exp(-1.5) (1 - 1/ratio): largest where the ratio is 0.4.
    assert measured["mismatch/probability_difference/absmax"] == pytest.approx(math.exp(-1.5) * 1.5, rel=1e-5)
    assert measured["mismatch/share_outside_0.99_to_1.01"] == pytest.approx(5 / 7)
    assert measured["mismatch/share_outside_0.8_to_1.25"] == pytest.approx(4 / 7)
    assert measured["mismatch/share_outside_0.5_to_2"] == pytest.approx(3 / 7)


def test_both_estimates_are_of_the_kl_from_the_rollout_policy() -> None:
    """Tokens drawn from mu: k1 and k3 converge to KL(mu || pi), and not to KL(pi || mu), which is larger."""
    mu, pi = torch.tensor([0.8, 0.15, 0.05]).log(), torch.tensor([0.5, 0.2, 0.3]).log()
    forward, backward = float((mu.exp() * (mu - pi)).sum()), float((pi.exp() * (pi - mu)).sum())
    assert backward > 1.2 * forward
    drawn = torch.multinomial(mu.exp(), 400_000, replacement=True, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(len(drawn), dtype=torch.bool)
    measured = scalars(mismatch_metrics((pi - mu)[drawn], mu[drawn], everywhere))
    assert measured["mismatch/kl/mean"] == pytest.approx(forward, rel=0.02)
    assert measured["mismatch/kl_k1/mean"] == pytest.approx(forward, rel=0.05)


def test_without_a_correction_the_mismatch_is_only_logged() -> None:
    batch = small_batch()
    logged = packed_loss(**batch, config=DAPO)
    plain = packed_loss(**{name: value for name, value in batch.items() if name != "rollout_log_probs"}, config=DAPO)
    assert torch.equal(logged.loss_sum, plain.loss_sum)
    assert torch.equal(logged.final_mask, plain.final_mask)
    more = logged.metrics.keys() - plain.metrics.keys()
    assert more == set(mismatch_metrics(RATIOS.log(), RATIOS, batch["response_mask"]))


def test_token_truncation_by_hand() -> None:
    output = packed_loss(**small_batch(), config=with_correction("token_truncated"))
    # Weights 1, 1.1, 2 (of 3), 0.4, 0.5, 2 (of 4), 1; nothing leaves the loss.
    assert output.token_loss[:7].tolist() == pytest.approx([-1, -1.1, -2, 0.8, 1, 4, -0.5], rel=1e-5)
    assert int(output.normalizer) == 7
    measured = scalars(output.metrics)
    assert measured["mismatch/truncated_share"] == pytest.approx(2 / 7)
    assert measured["mismatch/weight/mean"] == pytest.approx(8 / 7, rel=1e-5)
    assert measured["mismatch/weight/max"] == 2


def test_token_masking_by_hand() -> None:
    """IcePop: an upper and a lower end, and what is masked leaves the denominator."""
    output = packed_loss(**small_batch(), config=with_correction("token_masked", low=0.45, high=3.5))
    assert output.final_mask.tolist() == [True, True, True, False, True, False, True, False]
    assert float(output.loss_sum) == pytest.approx(-1 - 1.1 - 3 + 2 * 0.5 - 0.5, rel=1e-5)
    assert int(output.normalizer) == 5
    assert scalars(output.metrics)["mismatch/masked_share"] == pytest.approx(2 / 7)


def test_token_masking_under_sequence_mean_averages_over_accepted_tokens() -> None:
    config = with_correction("token_masked", low=0.45, high=3.5, loss_aggregation="sequence_mean")
    output = packed_loss(**small_batch(), config=config)
    assert float(output.loss_sum) == pytest.approx(-5.1 / 3 + 1.0 / 1 - 0.5 / 1, rel=1e-5)
    assert int(output.normalizer) == 3


def test_sequence_masking_by_hand() -> None:
    """rho(y) is 3.3, 0.8 and, without the masked token, 1.0."""
    output = packed_loss(**small_batch(), config=with_correction("sequence_masked"))
    assert output.final_mask.tolist() == [False] * 3 + [True] * 4 + [False]
    assert output.token_loss[3:7].tolist() == pytest.approx([1.6, 1.6, 1.6, -0.5], rel=1e-5)
    assert int(output.normalizer) == 4
    measured = scalars(output.metrics)
    assert measured["mismatch/masked_sequences_share"] == pytest.approx(1 / 3)
    assert measured["mismatch/masked_share"] == pytest.approx(3 / 7)
    assert measured["mismatch/weight/max"] == pytest.approx(1.0, rel=1e-5)


def test_geometric_masking_by_hand() -> None:
    """The geometric means are 3.3^(1/3) = 1.489, 0.8^(1/3) = 0.928 and 1; weights stay 1."""
    output = packed_loss(**small_batch(), config=with_correction("geometric_masked", low=0.95, high=1.5))
    assert output.final_mask.tolist() == [True] * 3 + [False] * 3 + [True, False]
    assert output.token_loss[:3].tolist() == [-1, -1, -1]
    assert int(output.normalizer) == 4


def test_a_correction_leaves_future_kl_alone() -> None:
    batch = small_batch()
    batch["log_probs"] = batch["log_probs"] + torch.linspace(-0.2, 0.2, 8)
    config = replace(with_correction("token_masked", low=0.99, high=1.01), future_kl=True, influence_min=0.8)
    plain = packed_loss(**batch, config=replace(config, rollout_correction="none"))
    masked = packed_loss(**batch, config=config)
    assert plain.future_kl is not None
    assert masked.future_kl is not None
    assert torch.equal(plain.future_kl, masked.future_kl)
    assert int(masked.normalizer) == 2
    assert scalars(masked.metrics)["fipo/filtered_sequences"] == 0, "the sequence filter counts its own only"


def test_weights_carry_no_gradient_and_leave_kl_and_entropy_alone() -> None:
    batch = small_batch()
    log_probs = batch["log_probs"].requires_grad_()
    extras = {"entropy": torch.full((8,), 2.0), "reference_log_probs": batch["old_log_probs"] - 0.1}
    config = with_correction("token_truncated", entropy_coefficient=0.5, kl_coefficient=0.25)
    output = packed_loss(**batch, **extras, config=config)
    k3 = math.exp(-0.1) + 0.1 - 1
    assert float(output.token_loss[2]) == pytest.approx(-2.0 + 0.25 * k3 - 1.0, rel=1e-5)
    plain = packed_loss(**batch, config=with_correction("token_truncated"))
    plain.loss_sum.backward()
    assert log_probs.grad is not None
    assert torch.allclose(log_probs.grad[:7], plain.token_loss[:7]), "the slope of w A r at r = 1 is w A"


@pytest.mark.parametrize("kind", CORRECTIONS)
def test_what_is_not_finite_reaches_the_loss(kind: str) -> None:
    """A mask must not swallow a NaN, or the run would go on with a broken engine."""
    batch = small_batch()
    batch["old_log_probs"][1] = math.nan
    assert not torch.isfinite(packed_loss(**batch, config=with_correction(kind)).loss_sum)


def test_huge_differences_do_not_overflow() -> None:
    batch = small_batch()
    batch["rollout_log_probs"] = batch["rollout_log_probs"] - 500.0
    for kind in CORRECTIONS:
        assert torch.isfinite(packed_loss(**batch, config=with_correction(kind)).loss_sum), kind


class Shard:
    """Every second row of sequences; sums over all rows are made of what each rank has shown in a round before."""

    def __init__(
        self,
        cu: Tensor,
        mask: Tensor,
        rank: int,
        calls: list[list[Tensor]],
        is_collecting: bool,
        summed: Callable[[list[Tensor]], Tensor],
    ) -> None:
        whole_ids = sequence_ids_of(cu, int(cu[-1]), cu.device)
        self.rows = torch.arange(rank, int(cu[-1]), 2)
        self.ids, self.num, self.counts_here = whole_ids[self.rows], len(cu) - 1, rank == 0
        self.response_tokens = count_per_sequence(mask, whole_ids, self.num)
        self._shown, self._calls, self._summed = calls[rank] if is_collecting else None, calls, summed
        self._num_calls = 0

    def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
        raise AssertionError("DAPO has no Future-KL")

    def total(self, per_sequence: Tensor) -> Tensor:
        if self._shown is not None:
            self._shown.append(per_sequence)
            return per_sequence
        self._num_calls += 1
        return self._summed([calls[self._num_calls - 1] for calls in self._calls])


def shards(
    kind: str,
    aggregation: str,
    summed: Callable[[list[Tensor]], Tensor] = sum,  # type: ignore[assignment]
) -> tuple[LossOutput, list[LossOutput]]:
    """The loss of a batch as a whole, and of its rows in two interleaved shards; `summed` adds up their sums."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([24, 8, 40, 16])
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    total = int(cu[-1])
    old = -3 * torch.rand(total, generator=generator)
    spread = torch.tensor([0.02, 0.6, 0.02, 0.5])[sequence_ids_of(cu, total, old.device)]
    # Neighbours in the third response err in opposite directions: as a whole it is sound, to either shard it is not.
    bias = (
        torch.where(torch.arange(total) % 2 == 0, 0.3, -0.3) * (torch.arange(total) >= 32) * (torch.arange(total) < 72)
    )
    batch = {
        "log_probs": old + 0.2 * torch.randn(total, generator=generator),
        "old_log_probs": old,
        "rollout_log_probs": old + bias + spread * torch.randn(total, generator=generator),
        "advantages": torch.randn(total, generator=generator),
        "response_mask": torch.rand(total, generator=generator) < 0.8,
    }
    batch["response_mask"][32:72] = True
    config = with_correction(kind, low=0.9, high=1.1, loss_aggregation=aggregation, sequence_sum_tokens=64)
    whole = packed_loss(**batch, cu_seqlens=cu, config=config)
    calls: list[list[Tensor]] = [[], []]
    outputs: list[LossOutput] = []
    for is_collecting in (True, False):
        outputs = []
        for rank in (0, 1):
            shard = Shard(cu, batch["response_mask"], rank, calls, is_collecting, summed)
            tokens = TokenValues(**{name: value[shard.rows] for name, value in batch.items()})
            outputs.append(policy_loss(tokens, shard, config))
    return whole, outputs


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("kind", CORRECTIONS)
def test_shards_add_up_to_the_whole(kind: str, aggregation: str) -> None:
    whole, parts = shards(kind, aggregation)
    assert float(parts[0].loss_sum + parts[1].loss_sum) == pytest.approx(float(whole.loss_sum), rel=1e-5)
    assert int(parts[0].normalizer + parts[1].normalizer) == int(whole.normalizer)
    merged, expected = scalars(merge([part.metrics for part in parts])), scalars(whole.metrics)
    assert merged.keys() == expected.keys()
    assert merged == pytest.approx(expected, rel=1e-5, nan_ok=True)
    if kind.endswith("masked"):
        assert 0 < expected["mismatch/masked_share"] < 1, "the test must mask something, and not everything"


@pytest.mark.parametrize("kind", ["sequence_masked", "geometric_masked"])
def test_a_rank_that_judges_by_its_own_rows_is_noticed(kind: str) -> None:
    whole, parts = shards(kind, "token_mean", summed=lambda sums: sums[0])
    assert float(parts[0].loss_sum + parts[1].loss_sum) != pytest.approx(float(whole.loss_sum), rel=1e-3)


def test_a_truncation_of_the_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clamping tokens to ± log 2 before the product would let sequences through that must leave."""
    right = packed_loss(**small_batch(), config=with_correction("sequence_masked"))
    monkeypatch.setattr(rollout_correction, "MAX_DIFFERENCE", math.log(1.5))
    assert not torch.equal(
        packed_loss(**small_batch(), config=with_correction("sequence_masked")).final_mask, right.final_mask
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (with_correction("token_masked"), "rollout_correction=token_masked needs rollout_log_probs"),
        (with_correction("icepop"), f"rollout_correction=icepop: must be one of {', '.join(CORRECTIONS)}\\."),
    ],
)
def test_refuses(config: FipoConfig, message: str) -> None:
    batch = {name: value for name, value in small_batch().items() if name != "rollout_log_probs"}
    with pytest.raises(ValueError, match=message):
        packed_loss(**batch, config=config)
