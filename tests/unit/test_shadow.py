"""Shadow objectives: what they measure is what training on them would measure, and nothing is trained on them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig, ShadowConfig
from megatron_fipo.metrics.reductions import merge, scalars
from megatron_fipo.rl.diagnostics import noise_floor
from megatron_fipo.rl.future_kl import future_kl_reference
from megatron_fipo.rl.objective import policy_loss
from megatron_fipo.rl.sequences import WholeSequences
from megatron_fipo.rl.token_values import TokenValues
from tests.losses import packed_loss
from tests.unit.test_objective import batch

FIPO = FipoConfig(influence_min=0.8, influence_max=1.2, safety_ratio=3.0)
BASES = {
    "fipo": FIPO,
    "dapo": replace(FIPO, future_kl=False),
    "behaviour": replace(FIPO, future_kl_reference="behaviour"),
    "dapo, behaviour": replace(FIPO, future_kl=False, future_kl_reference="behaviour"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "own": {},
    "tau_1": {"half_life_tokens": 1.0},
    "tau-128": {"half_life_tokens": 128.0},
    "wide": {"influence_min": 0.0, "influence_max": math.inf},
    "narrow": {"influence_min": 0.95, "influence_max": 1.0},
    "unsafe": {"safety_ratio": 100.0},
    "strict": {"dual_clip": 1.1, "half_life_tokens": 4.0},
    "unfiltered": {"filter_extreme_ratios": False},
}
SAME = (
    "influence_weight/mean",
    "influence_weight/std",
    "influence_weight/clipped_share",
    "future_kl/std",
    "future_kl/absmax",
)


def shadows(*names: str) -> dict[str, ShadowConfig]:
    return {name: ShadowConfig(**SETTINGS[name]) for name in names or SETTINGS}


def inputs() -> dict[str, Tensor]:
    """The batch of the loss's tests, with an author of its own for each token."""
    given = batch()
    noise = torch.randn(len(given["log_probs"]), generator=torch.Generator().manual_seed(5))
    return {**given, "rollout_log_probs": given["old_log_probs"] + 0.1 * noise}


def shadow_numbers(numbers: dict[str, float], name: str) -> dict[str, float]:
    prefix = f"shadow/{name}/"
    return {key.removeprefix(prefix): value for key, value in numbers.items() if key.startswith(prefix)}


def test_by_hand() -> None:
    """Half-life 1, so gamma 1/2; one sequence of three tokens, the last masked, and one of two."""
    settings = ShadowConfig(half_life_tokens=1.0, influence_min=0.9, influence_max=1.1, safety_ratio=3.0)
    shift = torch.tensor([0.0, 0.1, 0.2, math.log(4.0), -0.4])
    advantages = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    tokens = TokenValues(shift, torch.zeros(5), advantages, torch.tensor([True, True, False, True, True]))
    output = policy_loss(tokens, WholeSequences(torch.tensor([0, 3, 5])), replace(FIPO, shadow={"one": settings}))
    found = shadow_numbers(scalars(output.metrics), "one")
    future_kl = [0.05, 0.1, math.log(4) - 0.2, -0.4]
    # exp(0.1) and exp(log 4 - 0.2) are cut to 1.1, the latter then to 1 as its ratio of 4 is unsafe; exp(-0.4) to 0.9.
    weights = [math.exp(0.05), 1.1, 1.0, 0.9]
    # At a half-life of 32 within [0.8, 1.2]; the third is cut to 1.2, then to 1.
    gamma = 2 ** (-1 / 32)
    in_use = [math.exp(0.1 * gamma), math.exp(0.1), 1.0, 0.8]
    assert found == pytest.approx(
        {
            "influence_weight/mean": statistics.mean(weights),
            "influence_weight/std": statistics.pstdev(weights),
            "influence_weight/clipped_share": 3 / 4,
            "influence_weight/correlation": statistics.correlation(weights, in_use),
            "future_kl/std": statistics.pstdev(future_kl),
            "future_kl/absmax": math.log(4) - 0.2,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_a_shadow_measures_what_training_on_it_would(base: FipoConfig) -> None:
    """All shadows at once, each against a loss whose objective it is."""
    given = inputs()
    numbers = scalars(packed_loss(**given, config=replace(base, shadow=shadows())).metrics)
    seen = set()
    for name, settings in SETTINGS.items():
        expected = scalars(packed_loss(**given, config=replace(base, future_kl=True, **settings)).metrics)
        found = shadow_numbers(numbers, name)
        for stat in SAME:
            assert found[stat] == pytest.approx(expected[f"fipo/{stat}"], rel=1e-12, nan_ok=True), (name, stat)
        assert set(found) == {*SAME, "influence_weight/correlation"}
        seen.add(tuple(found[stat] for stat in SAME))
    assert len(seen) == len(SETTINGS), "two settings make no difference to this batch"


def test_the_correlation_is_with_the_weights_in_use() -> None:
    given = inputs()
    output = packed_loss(**given, config=replace(FIPO, shadow=shadows()))
    mask = given["response_mask"]
    in_use = output.influence_weights[mask].tolist()
    for name, settings in SETTINGS.items():
        other = packed_loss(**given, config=replace(FIPO, **settings)).influence_weights[mask].tolist()
        found = output.metrics[f"shadow/{name}/influence_weight/correlation"].value()
        assert found == pytest.approx(statistics.correlation(in_use, other), rel=1e-9), name
    assert output.metrics["shadow/own/influence_weight/correlation"].value() == pytest.approx(1.0, rel=1e-12)


def test_weights_that_do_not_vary_correlate_with_nothing() -> None:
    dapo = packed_loss(**inputs(), config=replace(BASES["dapo"], shadow=shadows("tau_1")))
    assert math.isnan(dapo.metrics["shadow/tau_1/influence_weight/correlation"].value())
    assert dapo.metrics["shadow/tau_1/influence_weight/std"].value() > 0.05
    constant = {"constant": ShadowConfig(influence_min=0.9, influence_max=0.9)}  # which float64 does not hold exactly
    fipo = packed_loss(**inputs(), config=replace(FIPO, shadow=constant, safety_ratio=1e6))
    assert math.isnan(fipo.metrics["shadow/constant/influence_weight/correlation"].value())


def test_nothing_is_clipped_before_the_policy_has_moved() -> None:
    """F is 0 and lies within a range that ends at 1."""
    ranges = {"upwards": ShadowConfig(influence_min=1.0), "downwards": ShadowConfig(influence_max=1.0)}
    given = inputs()
    given["log_probs"] = given["old_log_probs"].clone()
    metrics = packed_loss(**given, config=replace(FIPO, shadow=ranges)).metrics
    for name in ranges:
        found = shadow_numbers(scalars(metrics), name)
        assert math.isnan(found.pop("influence_weight/correlation"))
        assert found == {
            "influence_weight/mean": 1.0,
            "influence_weight/std": 0.0,
            "influence_weight/clipped_share": 0.0,
            "future_kl/std": 0.0,
            "future_kl/absmax": 0.0,
        }


@pytest.mark.parametrize("base", BASES.values(), ids=BASES.keys())
def test_nothing_else_changes(base: FipoConfig) -> None:
    """Loss, gradient and all other metrics keep their bits; without shadows there is no metric of them."""

    def of(config: FipoConfig) -> tuple[dict[str, float], list[Tensor]]:
        given = inputs()
        given["log_probs"].requires_grad_()
        output = packed_loss(**given, config=config)
        output.loss_sum.backward()
        assert given["log_probs"].grad is not None
        tensors = [output.loss_sum.detach(), output.normalizer, output.token_loss, output.influence_weights]
        return scalars(output.metrics), [*tensors, output.final_mask, given["log_probs"].grad]

    (plain, expected), (numbers, found) = of(base), of(replace(base, shadow=shadows()))
    assert not [name for name in plain if name.startswith("shadow/")]
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    others = {name: value for name, value in numbers.items() if not name.startswith("shadow/")}
    assert others == pytest.approx(plain, rel=0, abs=0, nan_ok=True)
    assert len(numbers) - len(others) == len(SETTINGS) * (len(SAME) + 1)


def test_microbatches_add_up_to_the_minibatch() -> None:
    given, config = inputs(), replace(FIPO, shadow=shadows())
    cu, parts = given["cu_seqlens"], []
    for first, last in ((0, 1), (1, 2), (2, 4)):
        rows = slice(int(cu[first]), int(cu[last]))
        tokens = {name: value[rows] for name, value in given.items() if name != "cu_seqlens"}
        parts.append(packed_loss(**tokens, cu_seqlens=cu[first : last + 1] - cu[first], config=config).metrics)
    merged, whole = scalars(merge([*parts])), scalars(packed_loss(**given, config=config).metrics)
    for name in SETTINGS:
        assert shadow_numbers(merged, name) == pytest.approx(shadow_numbers(whole, name), rel=1e-9, nan_ok=True)
    key = "shadow/tau_1/influence_weight/correlation"
    averaged = sum(part[key].value() for part in parts) / len(parts)
    assert averaged != pytest.approx(merged[key], rel=1e-3)


class Counting(WholeSequences):
    """Notes what it is asked to sum up."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        super().__init__(cu_seqlens)
        self.asked: list[Sequence[Tensor]] = []

    def suffix_sums(self, x: Sequence[Tensor], half_lives: Sequence[float]) -> list[Tensor]:
        self.asked.append(x)
        return super().suffix_sums(x, half_lives)


def test_all_shadows_are_summed_in_one_call_and_share_their_summands() -> None:
    given = inputs()
    sequences = Counting(given.pop("cu_seqlens"))
    policy_loss(TokenValues(**given), sequences, replace(FIPO, shadow=shadows()))
    (x,) = sequences.asked
    assert len(x) == len(SETTINGS)
    assert len({id(each) for each in x}) == 3  # the objective's own, those below 1.1, all of them
    policy_loss(TokenValues(**given), sequences, FIPO)
    assert len(sequences.asked) == 1, "without shadows nothing is asked"


def test_several_sums_are_those_of_one_by_one() -> None:
    x, cu = torch.randn(2, 90, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 33, 34, 90])
    found = WholeSequences(cu).suffix_sums([x[0], x[1], x[0]], [8.0, 32.0, 256.0])
    for sums, values, half_life in zip(found, (x[0], x[1], x[0]), (8.0, 32.0, 256.0), strict=True):
        assert sums.tolist() == pytest.approx(future_kl_reference(values, cu, half_life).tolist(), abs=2e-5)


def test_the_noise_floor_of_a_shadow() -> None:
    """The first update's spread over the later ones', for each shadow; what is trained on alone is warned about."""
    given = inputs()
    shift = given["log_probs"] - given["old_log_probs"]
    config = replace(BASES["dapo"], shadow=shadows("tau_1", "tau-128"))

    def update(scale: float) -> dict[str, float]:
        return scalars(
            packed_loss(**given | {"log_probs": given["old_log_probs"] + scale * shift}, config=config).metrics
        )

    first, later = update(1e-3), update(0.3)
    numbers = scalars(noise_floor(first, later).metrics)
    for name in ("tau_1", "tau-128"):
        share = first[f"shadow/{name}/future_kl/std"] / later[f"shadow/{name}/future_kl/std"]
        assert numbers[f"shadow/{name}/noise_floor/share_of_later_std"] == share
        assert share == pytest.approx(1 / 300, rel=1e-3)
    assert not [name for name in noise_floor(first, {}).metrics if name.startswith("shadow/")]
    quiet = {**first, "policy/log_prob_shift/std": 0.0}
    loud = noise_floor(quiet, {**later, "shadow/tau_1/future_kl/std": 1e-9})
    assert loud.warning == ""
    assert scalars(loud.metrics)["shadow/tau_1/noise_floor/share_of_later_std"] > 1e3
    still = dict.fromkeys((f"shadow/{name}/future_kl/std" for name in ("tau_1", "tau-128")), 0.0)
    on_policy = scalars(noise_floor({**first, **still}, {**later, **still}).metrics)
    assert on_policy["shadow/tau_1/noise_floor/share_of_later_std"] == 0.0


def test_refuses() -> None:
    given = inputs()
    del given["rollout_log_probs"]
    with pytest.raises(ValueError, match="future_kl_reference=behaviour needs rollout_log_probs"):
        packed_loss(**given, config=replace(BASES["dapo, behaviour"], shadow=shadows("tau_1")))
    packed_loss(**given, config=BASES["dapo, behaviour"])  # which sums nothing up
    with pytest.raises(ValueError, match=r"objective.shadow.x=\{'half_life_tokens': 8\}: a ShadowConfig was expected"):
        packed_loss(**given, config=replace(FIPO, shadow={"x": {"half_life_tokens": 8}}))  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"objective.shadow.x.half_life_tokens=0: must be above 0"):
        packed_loss(**given, config=replace(FIPO, shadow={"x": ShadowConfig(half_life_tokens=0)}))


def test_the_former_call_has_shadows_unless_its_suffix_sum_is_its_own() -> None:
    given, config = inputs(), replace(FIPO, shadow=shadows("tau_1"))
    expected = scalars(packed_loss(**given, config=config).metrics)
    with pytest.warns(DeprecationWarning, match="is deprecated"):
        found = policy_loss(**given, config=config)  # type: ignore[call-arg]
    assert shadow_numbers(scalars(found.metrics), "tau_1") == shadow_numbers(expected, "tau_1")
    with (
        pytest.warns(DeprecationWarning, match="is deprecated"),
        pytest.raises(ValueError, match="Pass TokenValues and Sequences"),
    ):
        policy_loss(  # type: ignore[call-arg]
            **given,
            config=config,
            suffix_sum=lambda x, flags, cu: (x, torch.zeros(len(cu) - 1)),
        )


def test_objectives_with_shadows_are_known_again() -> None:
    """A checked objective is not looked at again: it has a hash, and one with other shadows is another one."""
    one, same, other = (replace(FIPO, shadow={"a": ShadowConfig(tau)}) for tau in (8.0, 8.0, 9.0))
    assert hash(one) == hash(same)
    assert one == same
    assert one != other
