"""Log-probs taken out of one layout's microbatches and put into another's are each token's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.token_values import gather_old_log_probs, set_old_log_probs
from megatron_fipo.rl.packed_batch import PackedBatch
from tests.parallel.layouts import PAD_TOKEN, Case, config_of, groups_of_step, layout, save_models
from tests.parallel.ranks import RankError, run_ranks

P = ParallelSection
LAYOUTS = [P(cp=2), P(tp=2, sequence_parallel=True), P(pp=2), P()]
"""On two ranks; the last is data parallel."""


def _fill(minibatches: list[list[PackedBatch]]) -> None:
    """A number that says which token it is: sample and position."""
    for batch in (batch for batches in minibatches for batch in batches):
        samples = torch.tensor(batch.sample_indices)[batch.sequence_ids]
        batch.old_log_probs = samples + batch.position_ids / 1000.0


def _there_and_back(folder: str, shift: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Through every layout; a shift of the positions is the mistake that is to be noticed."""
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    for parallel in LAYOUTS:
        config = config_of(Case("any", parallel=parallel), folder)
        with layout(parallel) as ranks:
            minibatches = build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN)
            _fill(minibatches)
            expected = [
                torch.where(batch.response_mask, batch.old_log_probs, 0) for batches in minibatches for batch in batches
            ]
            found = gather_old_log_probs(minibatches, ranks)
            if saved:
                assert found.keys() == saved.keys()
                assert all(
                    torch.equal(one, two) for key in found for one, two in zip(found[key], saved[key], strict=True)
                )
                moved = {key: (positions + shift, values) for key, (positions, values) in saved.items()}
                set_old_log_probs(minibatches, moved)
                batches = [batch for batches in minibatches for batch in batches]
                assert all(torch.equal(batch.old_log_probs, old) for batch, old in zip(batches, expected, strict=True))
            saved = found
    return saved


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"))["qwen2"]


def test_each_token_gets_its_own_back_in_any_layout(model: str) -> None:
    saved = run_ranks(_there_and_back, 2, model, 0, timeout_s=120)[0]
    samples = [sample for group in groups_of_step(0) for sample in group.samples]
    assert sorted(saved) == list(range(len(samples)))
    for index, sample in enumerate(samples):
        positions, values = saved[index]
        first = len(sample.prompt_ids) - 1
        assert positions.tolist() == list(range(first, first + len(sample.response_ids)))
        assert torch.equal(values, index + positions / 1000.0)


def test_positions_that_are_off_by_one_are_noticed(model: str) -> None:
    with pytest.raises(RankError, match="holds no log-probs of the old policy for sample"):
        run_ranks(_there_and_back, 2, model, 1, timeout_s=120)


def test_another_batch_is_noticed(model: str) -> None:
    with pytest.raises(RankError, match="its rollouts are not those that the step began with"):
        run_ranks(_set_on_another_batch, 1, model, timeout_s=120)


def _set_on_another_batch(folder: str) -> None:
    config = config_of(Case("any"), folder)
    with layout(P()) as ranks:
        minibatches = build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN)
        _fill(minibatches)
        saved = gather_old_log_probs(minibatches, ranks)
        set_old_log_probs(build_minibatches(groups_of_step(1), config, ranks, PAD_TOKEN), saved)
