"""Every algorithm and option of the objective takes real steps, and does what sets it apart."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.actor.actor import Actor
from tests.end_to_end.runs import step_lines, train

NUM_SAMPLES = 8
ONE_STEP = ("train.num_steps=1", "data.train.chains.params.num_terms=7")
"""On the prompts that what is known below of a step is known of."""
RUNS: dict[str, tuple[str, ...]] = {
    "fipo": (),
    "dapo": ("algorithm=dapo", "objective.shadow={fipo: {}, tau_128: {half_life_tokens: 128}}"),
    "grpo": ("algorithm=grpo",),
    "grpo_sequence_mean": ("algorithm=grpo_sequence_mean",),
    "dr_grpo": ("algorithm=dr_grpo", "objective.sequence_sum_tokens=96"),
    "rloo": ("algorithm=rloo",),
    "penalty and bonus": ("objective.kl_coefficient=0.1", "objective.entropy_coefficient=0.01"),
    "one update": ("train.num_minibatches=1",),
}
FIPO_KEY = "fipo/influence_weight/mean"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[dict[str, Any], str]]:
    """Metrics of the one step, and what was printed."""
    results = {}
    for name, overrides in RUNS.items():
        folder = tmp_path_factory.mktemp("algorithm") / "run"
        (outcome,) = train(folder, *ONE_STEP, *overrides, world_size=1, expected=0)
        (line,) = step_lines(folder)
        results[name] = line, outcome.said
    return results


@pytest.mark.parametrize("name", RUNS)
def test_it_takes_a_step(name: str, runs: dict[str, Any]) -> None:
    line, _ = runs[name]
    assert line["optim/updates"] == (1 if name == "one update" else 2)
    assert math.isfinite(line["policy/loss/mean"])
    assert 0 < line["optim/grad_norm"] < math.inf
    assert line["policy/entropy/mean"] > 0
    assert line["rollout/batch_groups"] == 4


def test_only_fipo_weighs(runs: dict[str, Any]) -> None:
    with_weights = {name for name, (line, _) in runs.items() if FIPO_KEY in line}
    assert with_weights == {"fipo", "penalty and bonus", "one update"}
    assert runs["fipo"][0]["fipo/influence_weight/std"] > 0


def test_dapo_differs_from_fipo_in_nothing_else(runs: dict[str, Any]) -> None:
    fipo, dapo = runs["fipo"][0], runs["dapo"][0]
    # The first update weighs nothing, since the policy is the old one: both come to the second with the same weights.
    of_the_policy = ("policy/entropy/mean", "policy/kl/mean", "policy/log_prob_shift/std", "policy/ratio_positive/max")
    of_the_batch = ("reward/mean", "rollout/generated_groups", "advantages/std", "policy/response_tokens")
    for name in (*of_the_batch, *of_the_policy):
        assert fipo[name] == dapo[name], name
    assert abs(fipo["policy/loss/mean"] - dapo["policy/loss/mean"]) > 1e-4  # far above the rounding of float32


def test_a_shadow_of_dapo_is_what_fipo_sees_of_the_same_step(runs: dict[str, Any]) -> None:
    """Both come to the second update with the same weights; see above."""
    fipo, dapo = runs["fipo"][0], runs["dapo"][0]
    for stat in (
        *("influence_weight/mean", "influence_weight/std", "influence_weight/clipped_share"),
        *("future_kl/std", "future_kl/absmax"),
    ):
        assert math.isclose(dapo[f"shadow/fipo/{stat}"], fipo[f"fipo/{stat}"], rel_tol=1e-9), stat
    assert dapo["shadow/tau_128/future_kl/std"] > 1.01 * fipo["fipo/future_kl/std"]
    for name in ("fipo", "tau_128"):
        assert dapo[f"shadow/{name}/influence_weight/correlation"] is None, "all weights in use are 1"
        assert dapo[f"shadow/{name}/noise_floor/share_of_later_std"] == 0
    assert not [name for name in fipo if name.startswith("shadow/")]


def test_what_sets_the_grpo_family_apart(runs: dict[str, Any]) -> None:
    grpo, sequence_mean, dr_grpo, rloo = (runs[n][0] for n in ("grpo", "grpo_sequence_mean", "dr_grpo", "rloo"))
    family = (grpo, sequence_mean, dr_grpo, rloo)
    assert len({line["policy/response_tokens"] for line in family}) == 1, "none of them filters groups"
    assert all(line["rollout/generation_rounds"] == 1 for line in family)
    # Over a group of n that has right and wrong responses, squares of (R - mean) / std sum to n - 1. Without
    # the division they sum to 4k(n-k)/n for k right ones: to 6, 7.5 and 7.5 here, so that only the 1e-6 beside std
    # tells the two apart.
    num_responses = grpo["rollout/batch_groups"] * NUM_SAMPLES
    assert math.isclose(grpo["advantages/std"] ** 2 * num_responses, 3 * (NUM_SAMPLES - 1), rel_tol=1e-5)
    assert grpo["advantages/std"] == sequence_mean["advantages/std"]
    assert 5e-7 < dr_grpo["advantages/std"] / grpo["advantages/std"] - 1 < 2e-6
    # R_i - mean of the others = n/(n-1) (R_i - mean of all).
    assert math.isclose(rloo["advantages/std"], dr_grpo["advantages/std"] * NUM_SAMPLES / (NUM_SAMPLES - 1))
    assert abs(grpo["policy/loss/mean"] - sequence_mean["policy/loss/mean"]) > 1e-4  # far above rounding
    # The same sum, with advantages n/(n-1) times as large, over its tokens instead of 96 for each of its responses.
    ratio = NUM_SAMPLES / (NUM_SAMPLES - 1) * num_responses * 96 / rloo["policy/response_tokens"]
    assert math.isclose(rloo["policy/loss/mean"], dr_grpo["policy/loss/mean"] * ratio, rel_tol=1e-3)
    assert "policy/dual_clip_fraction" in rloo
    assert "policy/dual_clip_fraction" not in grpo


def test_penalty_and_bonus_are_measured_and_felt(runs: dict[str, Any]) -> None:
    plain, both = runs["fipo"][0], runs["penalty and bonus"][0]
    assert "policy/reference_kl/mean" not in plain
    # Zero in the first update, where the policy is the reference; positive in the second.
    assert 0 < both["policy/reference_kl/mean"] < 1
    assert both["policy/response_tokens"] == plain["policy/response_tokens"]
    # What is added, but for the little by which the second update's policies differ.
    added = 0.1 * both["policy/reference_kl/mean"] - 0.01 * both["policy/entropy/mean"]
    assert math.isclose(both["policy/loss/mean"] - plain["policy/loss/mean"], added, rel_tol=0.01)
    assert both["policy/entropy/mean"] > plain["policy/entropy/mean"]  # the first update has raised it


def test_one_update_per_step_is_called_inert(runs: dict[str, Any]) -> None:
    line, output = runs["one update"]
    assert "Warning: FIPO is inert" in output
    assert line["fipo/influence_weight/std"] == 0
    assert line["fipo/influence_weight/mean"] == 1
    assert "fipo/influence_weight/std_after_first_update" not in line
    assert "FIPO is inert" not in runs["fipo"][1]


def _noisy_old_log_probs() -> None:
    original = Actor.log_probs

    def noisy(self: Actor, *args: Any, **keywords: Any) -> Any:
        return [log_probs + 1e-3 for log_probs in original(self, *args, **keywords)]

    Actor.log_probs = noisy  # type: ignore[method-assign]


def test_the_noise_floor(runs: dict[str, Any], tmp_path: Path) -> None:
    line, output = runs["fipo"]
    # The same packing and the same kernels: nothing but the policy's change makes a shift.
    assert line["noise_floor/log_prob_shift/absmax"] == 0
    assert line["noise_floor/future_kl/absmax"] == 0
    assert line["policy/log_prob_shift/absmax"] > 0
    assert "Noise makes up" not in output

    train(tmp_path / "run", *ONE_STEP, world_size=1, prepare=_noisy_old_log_probs, expected=0)
    (noisy,) = step_lines(tmp_path / "run")
    assert math.isclose(noisy["noise_floor/log_prob_shift/absmax"], 1e-3, rel_tol=1e-2)
    assert noisy["noise_floor/future_kl/absmax"] > 1e-2
