"""The padded form of the objective: equal to the packed one and to a double loop, whatever lies in the padding."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import megatron_fipo
from megatron_fipo import FipoConfig, LossOutput, padded_future_kl, padded_policy_loss
from tests.losses import packed_loss

FIPO = FipoConfig(influence_min=0.8, influence_max=1.2, safety_ratio=3.0, half_life_tokens=5.0)
OBJECTIVES = {
    "fipo": FIPO,
    "sequence_mean": replace(FIPO, loss_aggregation="sequence_mean"),
    "sequence_sum": replace(FIPO, loss_aggregation="sequence_sum", sequence_sum_tokens=64),
    "kl_and_entropy": replace(FIPO, kl_coefficient=0.1, entropy_coefficient=0.01),
    "corrected": replace(FIPO, rollout_correction="token_masked", rollout_ratio_min=0.8, rollout_ratio_max=1.3),
    "dapo": FipoConfig(future_kl=False),
}
PER_TOKEN = ("reference_log_probs", "entropy", "rollout_log_probs")


def padded_batch(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Four responses: short, with a gap (a tool's tokens), one that the sequence filter drops, one of padding alone."""
    generator = torch.Generator().manual_seed(3)
    mask = torch.zeros(4, 19, dtype=torch.bool)
    mask[0, :11], mask[1, 2:19], mask[2, :15] = True, True, True
    mask[1, 7:10] = False
    old = -3 * torch.rand(4, 19, generator=generator)
    shift = 0.3 * torch.randn(4, 19, generator=generator)
    shift[0, 4], shift[1, 11], shift[2, 3:6] = 1.5, 3.0, 3.0
    batch = {
        "log_probs": old + shift,
        "old_log_probs": old,
        "reference_log_probs": old + 0.2 * torch.randn(4, 19, generator=generator),
        "entropy": torch.rand(4, 19, generator=generator),
        "rollout_log_probs": old + 0.2 * torch.randn(4, 19, generator=generator),
    }
    batch = {name: torch.where(mask, values, 0.0).to(dtype) for name, values in batch.items()}
    return batch | {"advantages": torch.tensor([0.9, -0.7, -1.1, 0.4], dtype=dtype), "response_mask": mask}


def packed_arguments(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same responses packed: each row up to its last real token; what lies between is kept, as distance."""
    lengths = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in batch["response_mask"]]
    packed = {
        name: torch.cat([row[:length] for row, length in zip(values, lengths, strict=True)])
        for name, values in batch.items()
        if name != "advantages"
    }
    packed["advantages"] = torch.repeat_interleave(batch["advantages"], torch.tensor(lengths))
    packed["cu_seqlens"] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    return packed


def with_leaf(arguments: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    leaf = arguments["log_probs"].clone().requires_grad_()
    return arguments | {"log_probs": leaf}, leaf


def from_padded(batch: dict[str, Tensor], config: FipoConfig) -> tuple[LossOutput, Tensor]:
    arguments, leaf = with_leaf(batch)
    output = padded_policy_loss(**arguments, config=config)
    output.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return output, leaf.grad


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padded_equals_packed(name: str) -> None:
    batch, config = padded_batch(), OBJECTIVES[name]
    mask = batch["response_mask"]
    padded, padded_gradient = from_padded(batch, config)
    arguments, leaf = with_leaf(packed_arguments(batch))
    packed = packed_loss(**arguments, config=config)
    packed.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None

    real = arguments["response_mask"]
    assert int(padded.normalizer) == int(packed.normalizer) > 0
    torch.testing.assert_close(padded.loss_sum, packed.loss_sum)
    for ours, theirs in (
        (padded_gradient, leaf.grad),
        (padded.token_loss, packed.token_loss),
        (padded.influence_weights, packed.influence_weights),
        (padded.final_mask, packed.final_mask),
    ):
        assert ours.shape == mask.shape
        torch.testing.assert_close(ours[mask], theirs[real])
    if config.future_kl:
        assert padded.future_kl is not None
        assert packed.future_kl is not None
        torch.testing.assert_close(padded.future_kl[mask], packed.future_kl[real])
        assert not bool(padded.final_mask[2].any()), "the sequence filter drops the third response"
    assert set(padded.metrics) == set(packed.metrics)


def double_loop(batch: dict[str, Tensor], config: FipoConfig) -> tuple[float, list[list[float]]]:
    """FIPO's loss by token mean, and F, written down from the paper's formulas in Python's floats."""
    log_probs, old, mask = (batch[name].tolist() for name in ("log_probs", "old_log_probs", "response_mask"))
    num_responses, length = len(mask), len(mask[0])
    gamma = 2.0 ** (-1.0 / config.half_life_tokens)
    assert config.dual_clip is not None
    future = [[0.0] * length for _ in range(num_responses)]
    total, count = 0.0, 0
    for row in range(num_responses):
        advantage = float(batch["advantages"][row])
        shift = [log_probs[row][k] - old[row][k] for k in range(length)]
        for t in range(length):
            for k in range(t, length):
                if mask[row][k] and math.exp(shift[k]) <= config.dual_clip:
                    future[row][t] += gamma ** (k - t) * shift[k]
        real = [t for t in range(length) if mask[row][t]]
        extreme = sum(advantage < 0 and math.exp(shift[t]) > config.dual_clip for t in real)
        if extreme > config.max_dual_clipped_tokens:
            continue
        for t in real:
            ratio = math.exp(shift[t])
            weight = min(max(math.exp(future[row][t]), config.influence_min), config.influence_max)
            if advantage < 0 and ratio > config.safety_ratio:
                weight = min(max(weight, 0.8), 1.0)
            clipped = min(max(ratio, 1 - config.clip_ratio_low), 1 + config.clip_ratio_high)
            loss = max(-weight * advantage * ratio, -weight * advantage * clipped)
            if advantage < 0:
                loss = min(loss, -weight * advantage * config.dual_clip)
            total, count = total + loss, count + 1
    return total / count, future


def errors_against_the_double_loop(loop_config: FipoConfig) -> tuple[float, float]:
    """Largest differences of the loss and of F between `padded_policy_loss` with FIPO and the loop with a config."""
    batch = padded_batch()
    output = padded_policy_loss(**batch, config=FIPO)
    assert output.future_kl is not None
    loss, future = double_loop(batch, loop_config)
    error = (output.future_kl.double() - torch.tensor(future, dtype=torch.float64)).abs().max()
    return abs(float(output.loss_sum / output.normalizer) - loss), float(error)


def test_padded_equals_a_double_loop_in_float64() -> None:
    loss_error, future_kl_error = errors_against_the_double_loop(FIPO)
    assert loss_error < 1e-6
    assert future_kl_error < 4e-6


def test_the_double_loop_tells_objectives_apart() -> None:
    loss_error, future_kl_error = errors_against_the_double_loop(replace(FIPO, half_life_tokens=5.1))
    assert loss_error > 1e-5
    assert future_kl_error > 1e-3


def test_future_kl_of_padded_rows() -> None:
    batch = padded_batch()
    shift = batch["log_probs"] - batch["old_log_probs"]
    values = padded_future_kl(shift, batch["response_mask"], half_life_tokens=1.0)
    masked = torch.where(batch["response_mask"], shift, 0.0)
    assert float(values[1, 17]) == pytest.approx(float(masked[1, 17] + 0.5 * masked[1, 18]), rel=1e-6)
    assert float(values[1, 6]) == pytest.approx(float(masked[1, 6] + 0.5**4 * values[1, 10]), rel=1e-6)


@pytest.mark.parametrize("filling", [7.0, math.nan, -math.inf])
def test_what_lies_in_the_padding_is_never_read(filling: float) -> None:
    batch, config = padded_batch(), OBJECTIVES["kl_and_entropy"]
    mask = batch["response_mask"]
    batch["advantages"] = batch["advantages"][:, None].expand(4, 19)
    clean, clean_gradient = from_padded(batch, config)
    filled = {
        name: values if name == "response_mask" else torch.where(mask, values, filling)
        for name, values in batch.items()
    }
    output, gradient = from_padded(filled, config)
    assert torch.equal(output.loss_sum, clean.loss_sum)
    assert torch.equal(gradient, clean_gradient)
    assert not bool(gradient[~mask].any())
    shift = batch["log_probs"] - batch["old_log_probs"]
    future_kl = padded_future_kl(torch.where(mask, shift, filling), mask, half_life_tokens=5.0)
    assert torch.equal(future_kl, padded_future_kl(shift, mask, half_life_tokens=5.0))


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool])
def test_masks_and_advantages_as_trainers_have_them(dtype: torch.dtype) -> None:
    batch = padded_batch()
    expected = padded_policy_loss(**batch, config=FIPO).loss_sum
    advantages = batch["advantages"]
    for form in (advantages, advantages[:, None], advantages[:, None].expand(4, 19)):
        changed: dict[str, Any] = {"advantages": form, "response_mask": batch["response_mask"].to(dtype)}
        assert torch.equal(padded_policy_loss(**(batch | changed), config=FIPO).loss_sum, expected)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"log_probs": torch.zeros(4)}, r"padded responses are \[B, L\]; these have the shape \(4,\)"),
        ({"response_mask": torch.ones(4, 25)}, r"response_mask has the shape \(4, 25\) .* without the prompt's"),
        ({"response_mask": torch.full((4, 19), 0.5)}, "values other than 0 and 1"),
        ({"old_log_probs": torch.zeros(4, 18)}, r"old_log_probs has the shape \(4, 18\)"),
        ({"advantages": torch.zeros(19)}, r"advantages has the shape \(19,\)"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        padded_policy_loss(**(padded_batch() | changed), config=FIPO)


def test_the_package_is_cheap_until_a_name_is_asked_for() -> None:
    code = (
        "import sys, megatron_fipo\n"
        "heavy = ('torch', 'omegaconf', 'numpy', 'megatron', 'transformers')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "megatron_fipo.FipoConfig\n"
        "print([name for name in ('torch', 'numpy') if name in sys.modules])\n"
        "megatron_fipo.policy_loss, megatron_fipo.padded_policy_loss, megatron_fipo.future_kl\n"
        "megatron_fipo.TokenValues, megatron_fipo.WholeSequences, megatron_fipo.ShardedSequences\n"
        "print([name for name in ('megatron', 'transformers', 'tensorboard') if name in sys.modules])\n"
    )
    folder = Path(megatron_fipo.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert (run.stdout.splitlines(), run.stderr) == (["[]", "[]", "[]"], "")


def test_every_public_name_is_there_and_no_other() -> None:
    assert all(getattr(megatron_fipo, name) is not None for name in megatron_fipo.__all__)
    assert set(megatron_fipo.__all__) <= set(dir(megatron_fipo))
    with pytest.raises(AttributeError, match=r"no attribute 'polcy_loss'; it has .*policy_loss"):
        megatron_fipo.polcy_loss  # noqa: B018
