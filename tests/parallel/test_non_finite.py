"""A NaN on any rank stops all ranks before the optimizer step, says where it is from, and leaves the weights alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.non_finite import NonFiniteError
from megatron_fipo.config import ParallelSection
from megatron_fipo.rl.packed_batch import PackedBatch
from tests.parallel.layouts import Breakage, Case, Outcome, config_of, layout, save_models, train_step, whole_weights
from tests.parallel.ranks import run_ranks

P = ParallelSection
LAYOUTS = {"dp2": P(), "cp2": P(cp=2), "tp2": P(tp=2), "pp2": P(pp=2)}
BAD_RANK, STEP = 1, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"), num_layers=2)["qwen2"]


def _update_with_nan(what: str, parallel: ParallelSection, folder: str) -> tuple[str, bool, bool]:
    """(the error, whether no weight changed, whether the next good step still works)."""
    config = config_of(Case("", parallel=parallel), folder)
    with layout(parallel) as ranks:
        actor = Actor(config, ranks)
        train_step(actor, config, 0, Outcome())
        before = whole_weights(actor)

        def spoil(batch: PackedBatch) -> PackedBatch:
            if dist.get_rank() != BAD_RANK or not batch.response_mask.any():
                return batch
            row = int(batch.response_mask.nonzero()[0])
            advantages = batch.advantages.clone()
            advantages[row] = torch.nan
            return replace(batch, advantages=advantages)

        if what == "weight" and dist.get_rank() == BAD_RANK:
            held = next(p for name, p in actor.models[0].named_parameters() if "layers" in name)
            saved = held.data.clone()
            held.data.view(-1)[0] = torch.nan
        breakage = Breakage(batches=spoil) if what == "advantage" else Breakage()
        with pytest.raises(NonFiniteError) as caught:
            train_step(actor, config, STEP, Outcome(), breakage)
        if what == "weight" and dist.get_rank() == BAD_RANK:
            held.data.copy_(saved)
        after = whole_weights(actor)
        unchanged = all(torch.equal(after[name], weight) for name, weight in before.items())
        outcome = Outcome()
        train_step(actor, config, STEP, outcome)
        return str(caught.value), unchanged, all(norm > 0 for norm in outcome.grad_norms)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("what", ["advantage", "weight"])
def test_a_nan_on_one_rank_stops_all_before_the_step(folder: str, name: str, what: str) -> None:
    results = run_ranks(_update_with_nan, 2, what, LAYOUTS[name], folder, timeout_s=120)
    messages = {message for message, _, _ in results}
    assert len(messages) == 1, "ranks disagree"
    message = messages.pop()
    assert re.match(rf"step {STEP}, rank \d+: the loss is nan; .*samples \[\d", message), message
    if what == "advantage" and name != "tp2":
        assert message.startswith(f"step {STEP}, rank {BAD_RANK}: ")
        assert "; advantages of samples" in message
    if what == "weight":
        assert "; log-probs of samples" in message
    assert message.endswith("No optimizer step was taken.")
    for _, unchanged, works_again in results:
        assert unchanged
        assert works_again
