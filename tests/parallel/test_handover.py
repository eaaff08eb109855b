"""What goes over to the rollout engine: the actor's log-probs of the canary, and the memory that it lends."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.offload import StorageOffload
from megatron_fipo.config import ParallelSection
from megatron_fipo.rollout.handover import actor_log_probs
from megatron_fipo.rollout.servers.proof import canary_sequences
from tests.models import load
from tests.parallel.layouts import Case, Outcome, config_of, layout, save_models, train_step, whole_weights
from tests.parallel.ranks import run_ranks

P = ParallelSection
LAYOUTS = {
    2: [P(cp=2), P(tp=2, sequence_parallel=True), P(pp=2), P()],
    4: [P(pp=2, virtual_pp=2), P(tp=2, pp=2)],
}
SEQUENCES = canary_sequences(20, 3, num_tokens=13)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"))["qwen2"]


def _in_layouts(folder: str, layouts: list[ParallelSection]) -> list[list[list[float]]]:
    found = []
    for parallel in layouts:
        config = config_of(Case("any", parallel=parallel), folder)  # its sampling temperature is not 1
        with layout(parallel) as ranks:
            found.append(actor_log_probs(Actor(config, ranks), config, SEQUENCES))
    return found


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_the_canarys_log_probs_are_those_of_transformers(model: str, world_size: int) -> None:
    reference, tokens = load(Path(model)), torch.tensor(SEQUENCES)
    with torch.no_grad():
        log_p = torch.log_softmax(reference(tokens).logits[:, :-1], -1)
    expected = log_p.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    for of_rank in run_ranks(_in_layouts, world_size, model, LAYOUTS[world_size], timeout_s=120):
        for found in of_rank:
            assert torch.allclose(torch.tensor(found), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, expected.roll(1, dims=1), rtol=0, atol=1e-5), "a shift would show"


def _lend_and_take_back(folder: str, is_lent: bool, keeps_optimizer: bool) -> tuple[list[float], int]:
    """Two steps, the actor's memory lent between them."""
    config = config_of(Case("any", parallel=P(tp=2)), folder)
    with layout(P(tp=2)) as ranks:
        actor, outcome = Actor(config, ranks), Outcome()
        train_step(actor, config, 0, outcome)
        before, num_bytes = whole_weights(actor), 0
        if is_lent:
            lasting = list(actor._lasting_tensors())
            if not keeps_optimizer:
                lasting = [parameter.detach() for model in actor.models for parameter in model.parameters()]
            states = [
                value
                for single in [actor.optimizer]
                for value in single.optimizer.state.values()
                for value in value.values()
                if isinstance(value, torch.Tensor) and value.dim()
            ]
            dropped = [*actor._gradient_buffers(), *([] if keeps_optimizer else states)]
            lent = StorageOffload(lasting, dropped)
            lent.offload()
            num_bytes = lent.num_bytes
            assert all(tensor.untyped_storage().nbytes() == 0 for tensor in lasting)
            lent.onload()
            after = whole_weights(actor)
            assert all(torch.equal(before[name], weight) for name, weight in after.items())
        train_step(actor, config, 1, outcome)
    return outcome.grad_norms, num_bytes


def test_memory_that_was_lent_comes_back_as_it_was(model: str) -> None:
    kept, _ = run_ranks(_lend_and_take_back, 2, model, False, True, timeout_s=120)[0]
    lent, num_bytes = run_ranks(_lend_and_take_back, 2, model, True, True, timeout_s=120)[0]
    assert lent == kept
    # In float32: weights, gradients, two moments; the main parameters are the weights.
    num_parameters = sum(parameter.numel() for parameter in load(Path(model)).parameters())
    assert 16 * num_parameters / 2 < num_bytes < 16 * num_parameters


def test_a_moment_that_does_not_come_back_is_noticed(model: str) -> None:
    kept, _ = run_ranks(_lend_and_take_back, 2, model, False, True, timeout_s=120)[0]
    lent, _ = run_ranks(_lend_and_take_back, 2, model, True, False, timeout_s=120)[0]
    assert lent != kept
