"""The objective against outputs recorded from FIPO's public code."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.conformance.recording import FILES
from megatron_fipo.metrics.reductions import scalars
from megatron_fipo.rl import objective
from megatron_fipo.rl.future_kl import future_kl_reference
from megatron_fipo.rl.objective import LossOutput, policy_loss
from megatron_fipo.rl.sequences import WholeSequences, count_per_sequence
from megatron_fipo.rl.token_values import TokenValues

SCALARS = {
    "policy_kl": "policy/kl/mean",
    "clip_fraction": "policy/clip_fraction",
    "dual_clip_fraction": "policy/dual_clip_fraction",
    "influence_clipped_high_fraction": "fipo/influence_weight/clipped_high_share",
    "influence_clipped_low_fraction": "fipo/influence_weight/clipped_low_share",
    "influence_weight_mean": "fipo/influence_weight/mean",
}


Broken = Callable[["Recording", pytest.MonkeyPatch], tuple[LossOutput, Tensor]]
"""Runs a recording through an objective that was broken on purpose."""


@dataclass
class Recording:
    """One file, its [B, L] rows packed one behind the other."""

    arrays: dict[str, Tensor]
    numbers: dict[str, float]
    cu_seqlens: Tensor
    config: FipoConfig


def load(path: Path) -> Recording:
    with np.load(path) as file:
        entries = {name: file[name] for name in file.files}
    rows, length = entries["log_probs"].shape
    return Recording(
        arrays={name: torch.from_numpy(value).reshape(-1) for name, value in entries.items() if value.ndim == 2},
        numbers={name: float(entries[name]) for name in ("loss", *SCALARS)},
        cu_seqlens=torch.arange(rows + 1) * length,
        config=FipoConfig(**json.loads(str(entries["config"]))),
    )


class DoubleSequences(WholeSequences):
    """Their suffix sum is the recurrence in float64."""

    def __init__(self, cu_seqlens: Tensor) -> None:
        super().__init__(cu_seqlens)
        self.cu_seqlens = cu_seqlens

    def suffix_sum(self, x: Tensor, flags: Tensor, half_life_tokens: float) -> tuple[Tensor, Tensor]:
        counts = count_per_sequence(flags, self.ids, self.num)
        return future_kl_reference(x, self.cu_seqlens, half_life_tokens), counts


def reproduce(recording: Recording, dtype: torch.dtype, config: FipoConfig | None = None) -> tuple[LossOutput, Tensor]:
    """The loss in `dtype` and the gradient of its token mean."""
    config = config or recording.config
    log_probs = recording.arrays["log_probs"].to(dtype).requires_grad_()
    tokens = TokenValues(
        log_probs,
        recording.arrays["old_log_probs"].to(dtype),
        recording.arrays["advantages"].to(dtype),
        recording.arrays["response_mask"],
    )
    sequences = DoubleSequences if dtype == torch.float64 else WholeSequences
    output = policy_loss(tokens, sequences(recording.cu_seqlens), config)
    (output.loss_sum / output.normalizer).backward()
    assert log_probs.grad is not None
    return output, log_probs.grad


def disagreements(recording: Recording, output: LossOutput, gradient: Tensor, tolerance: float) -> set[str]:
    """Names of what differs from the recording by more than the tolerance."""
    expected, found = recording.arrays, set()
    assert output.future_kl is not None
    for name, actual in (
        ("future_kl", output.future_kl),
        ("influence_weights", output.influence_weights),
        ("token_loss", output.token_loss),
    ):
        error = (actual.double() - expected[name]).abs()
        if not bool((error <= tolerance).all()):
            found.add(name)
    if not torch.equal(output.final_mask, expected["final_mask"]):
        found.add("final_mask")
    # The public code divides by tokens + 1e-8; multiplied by this, our means are comparable to the last digit.
    by_response, by_final = (
        int(count) / (int(count) + 1e-8) for count in (expected["response_mask"].sum(), expected["final_mask"].sum())
    )
    largest = expected["grad_log_probs"].abs().max()
    if not bool(((gradient.double() * by_final - expected["grad_log_probs"]).abs() <= tolerance * largest).all()):
        found.add("grad_log_probs")
    measured = {name: scalars(output.metrics)[key] * by_response for name, key in SCALARS.items()}
    measured["loss"] = float(output.loss_sum.detach()) / float(output.normalizer) * by_final
    for name, number in measured.items():
        if not abs(number - recording.numbers[name]) <= tolerance:
            found.add(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)], ids=["f32", "f64"])
def test_reproduces_the_recording(path: Path, dtype: torch.dtype, tolerance: float) -> None:
    recording = load(path)
    output, gradient = reproduce(recording, dtype)
    assert output.loss_sum.dtype == dtype
    assert disagreements(recording, output, gradient, tolerance) == set()


def test_every_recording_is_there() -> None:
    assert {path.stem for path in FILES} == {
        "extreme_shifts",
        "half_life_256",
        "half_life_8",
        "length_1",
        "multi_turn_mask",
        "no_weight_clip",
        "on_policy",
        "recipe_32b",
        "recipe_7b",
        "wide_weights",
    }


def with_config(**changes: object) -> Broken:
    def run(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> tuple[LossOutput, Tensor]:
        return reproduce(recording, torch.float32, replace(recording.config, **changes))  # type: ignore[arg-type]

    return run


def with_attribute(name: str, value: object) -> Broken:
    def run(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> tuple[LossOutput, Tensor]:
        monkeypatch.setattr(objective, name, value)
        return reproduce(recording, torch.float32)

    return run


def with_bfloat16_gamma(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> tuple[LossOutput, Tensor]:
    gamma = float(torch.tensor(2 ** (-1 / recording.config.half_life_tokens)).bfloat16())
    return reproduce(recording, torch.float32, replace(recording.config, half_life_tokens=-1 / float(np.log2(gamma))))


@pytest.mark.parametrize(
    ("stem", "broken", "expected"),
    [
        pytest.param("extreme_shifts", with_config(filter_extreme_ratios=False), "future_kl", id="no participates"),
        pytest.param("extreme_shifts", with_config(max_dual_clipped_tokens=999), "final_mask", id="no sequence filter"),
        pytest.param("recipe_7b", with_config(max_dual_clipped_tokens=0), "final_mask", id="filter from one token on"),
        pytest.param("recipe_7b", with_config(safety_ratio=1e9), "influence_weights", id="no safety clip"),
        pytest.param("wide_weights", with_attribute("SAFETY_RANGE", (1.0, 1.0)), "influence_weights", id="safety f=1"),
        pytest.param("recipe_32b", with_config(half_life_tokens=31.0), "future_kl", id="half-life 31 for 32"),
        pytest.param("recipe_32b", with_bfloat16_gamma, "future_kl", id="bfloat16 gamma"),
        pytest.param("extreme_shifts", with_config(dual_clip=11.0), "token_loss", id="dual clip 11"),
        pytest.param("extreme_shifts", with_attribute("MAX_LOG_PROB_SHIFT", 15.0), "future_kl", id="clamp at 15"),
        pytest.param("recipe_7b", with_config(clip_ratio_high=0.2), "grad_log_probs", id="symmetric clip"),
    ],
)
def test_notices_a_broken_objective(stem: str, broken: Broken, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = load(next(path for path in FILES if path.stem == stem))
    output, gradient = broken(recording, monkeypatch)
    assert expected in disagreements(recording, output, gradient, 2e-5)
