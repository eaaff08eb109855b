"""docs/library.md's loss of sequences that ranks share: on two gloo ranks, without Megatron, it is one process's."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo import FipoConfig, LossOutput, ShardedSequences, TokenValues, WholeSequences, policy_loss
from megatron_fipo.rl.future_kl import future_kl_reference
from tests.parallel.ranks import run_ranks
from tests.unit.test_former_call import differences
from tests.unit.test_library_page import CONFIG, run_block

LENGTHS = (4, 20, 400, 36, 8)
"""Padded to multiples of 4; the fourth is dropped by the sequence filter, the last holds no response token."""
CU_SEQLENS = torch.tensor([0, *itertools.accumulate(LENGTHS)])
CONFIGS = {
    "token_mean": CONFIG,
    "sequence_mean": replace(CONFIG, loss_aggregation="sequence_mean"),
    "masked": replace(
        CONFIG, loss_aggregation="sequence_mean", rollout_correction="sequence_masked", rollout_ratio_max=3.0
    ),
}
ROUNDING = 1e-5
"""Of float32 sums and of weights by Future-KL, relative."""
ERROR_BOUND = 2e-6
"""Of Future-KL, relative to the sum of absolute values (docs/fipo.md)."""


def whole_batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    old = -3 * torch.rand(len(ids), generator=generator)
    shift = 0.3 * torch.randn(len(ids), generator=generator)
    shift[425:460:12] = 3.0  # in either rank's rows
    mask = torch.rand(len(ids), generator=generator) < 0.8
    mask[425:460:12], mask[-8:] = True, False
    return {
        "log_probs": old + shift,
        "old_log_probs": old,
        "advantages": torch.tensor([1.0, -0.5, 0.7, -1.0, 0.2])[ids],
        "response_mask": mask,
        "rollout_log_probs": old + 0.05 * torch.randn(len(ids), generator=generator),
    }


def with_gradient(values: dict[str, Tensor], sequences: Any, config: FipoConfig) -> tuple[LossOutput, Tensor]:
    leaf = values["log_probs"].clone().requires_grad_()
    output = policy_loss(TokenValues(**{**values, "log_probs": leaf}), sequences, config)
    output.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return output, leaf.grad


def one_stretch_each(rank: int) -> Tensor:
    """Rows of a layout that is not ours: half of each sequence, the front on rank 0 and the back on rank 1."""
    halves = [torch.arange(start, end).chunk(2) for start, end in itertools.pairwise(CU_SEQLENS.tolist())]
    return torch.cat([pair[rank] for pair in halves])


def _rank() -> dict[str, Any]:
    """One rank's part of the page's example, and of the loss under other objectives."""
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    assert group is not None
    sequences, batch = ShardedSequences.of(CU_SEQLENS, group), whole_batch()
    own = {name: values[sequences.rows] for name, values in batch.items()}
    leaf = own["log_probs"].clone().requires_grad_()
    others = [own[name] for name in ("old_log_probs", "advantages", "response_mask")]
    loss = run_block("def sharded_loss(")["sharded_loss"](leaf, *others, CU_SEQLENS, group)
    loss.backward()
    found: dict[str, Any] = {"rows": sequences.rows, "loss": loss.detach(), "gradient": leaf.grad}
    found["outputs"] = {name: with_gradient(own, sequences, config) for name, config in CONFIGS.items()}
    if group.size() > 1:
        rows = one_stretch_each(group.rank())
        other = policy_loss(TokenValues(**{name: values[rows] for name, values in batch.items()}), sequences, CONFIG)
        found["another layout"] = other.loss_sum
        with pytest.raises(ValueError, match="cp=2 needs padded lengths divisible by 4; sequence 1 has 6"):
            ShardedSequences.of(torch.tensor([0, 4, 10]), group)
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def of_two_ranks() -> list[dict[str, Any]]:
    return run_ranks(_rank, 2, timeout_s=120)


def test_two_ranks_are_one_process(of_two_ranks: list[dict[str, Any]]) -> None:
    ranks, batch = of_two_ranks, whole_batch()
    rows = torch.cat([found["rows"] for found in ranks])
    assert torch.equal(rows.sort().values, torch.arange(int(CU_SEQLENS[-1])))

    whole, gradient = with_gradient(batch, WholeSequences(CU_SEQLENS), CONFIG)
    mean = float(whole.loss_sum / whole.normalizer)
    assert float(sum(found["loss"] for found in ranks)) == pytest.approx(mean, rel=ROUNDING)
    parts = torch.cat([found["gradient"] for found in ranks])
    torch.testing.assert_close(parts, gradient[rows] / whole.normalizer, rtol=ROUNDING, atol=1e-9)
    elsewhere = float(sum(found["another layout"] for found in ranks))
    assert abs(elsewhere / float(whole.loss_sum) - 1) > 100 * ROUNDING, "another layout is another loss"


@pytest.mark.parametrize("name", CONFIGS)
def test_masks_counts_and_future_kl_are_those_of_whole_sequences(name: str, of_two_ranks: list[dict[str, Any]]) -> None:
    batch, rows = whole_batch(), torch.cat([found["rows"] for found in of_two_ranks])
    outputs = [found["outputs"][name] for found in of_two_ranks]
    expected, gradient = with_gradient(batch, WholeSequences(CU_SEQLENS), CONFIGS[name])
    assert torch.equal(torch.cat([output.final_mask for output, _ in outputs]), expected.final_mask[rows])
    assert 1 < sum(int(output.normalizer) for output, _ in outputs) == int(expected.normalizer)
    shift = torch.where(batch["response_mask"], batch["log_probs"] - batch["old_log_probs"], 0.0)
    scale = future_kl_reference(shift.abs(), CU_SEQLENS, CONFIG.half_life_tokens)[rows]
    difference = torch.cat([output.future_kl for output, _ in outputs]) - expected.future_kl[rows]
    assert bool((difference.abs() <= 2 * ERROR_BOUND * scale).all()), "each is within the bound of the exact sum"
    torch.testing.assert_close(torch.cat([part for _, part in outputs]), gradient[rows], rtol=ROUNDING, atol=1e-8)


def test_a_group_of_one_gives_the_same_bits() -> None:
    (found,) = run_ranks(_rank, 1, timeout_s=120)
    assert torch.equal(found["rows"], torch.arange(int(CU_SEQLENS[-1])))
    for name, config in CONFIGS.items():
        expected = with_gradient(whole_batch(), WholeSequences(CU_SEQLENS), config)
        assert differences(found["outputs"][name], expected) == set(), name
