"""The memory that the actor lends to the rollout engine comes back as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.offload import StorageOffload
from megatron_fipo.actor.optimizer import single_optimizers
from megatron_fipo.config import ParallelSection
from tests.models import load
from tests.parallel.layouts import Case, Outcome, config_of, layout, save_models, train_step, whole_weights
from tests.parallel.ranks import run_ranks

P = ParallelSection


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"), num_layers=2)["qwen2"]


@pytest.fixture(scope="module")
def kept(model: str) -> list[float]:
    """The gradient norms of a run whose memory is never lent."""
    return run_ranks(_lend_and_take_back, 2, model, False, True, timeout_s=120)[0][0]


def _lend_and_take_back(folder: str, is_lent: bool, keeps_optimizer: bool) -> tuple[list[float], int]:
    """Two steps, the actor's memory lent between them."""
    config = config_of(Case("any", parallel=P(tp=2), max_tokens=400), folder)
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
                for single in single_optimizers(actor.optimizer)
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


def test_memory_that_was_lent_comes_back_as_it_was(model: str, kept: list[float]) -> None:
    lent, num_bytes = run_ranks(_lend_and_take_back, 2, model, True, True, timeout_s=120)[0]
    assert lent == kept
    # In float32: weights, gradients, two moments; the main parameters are the weights.
    num_parameters = sum(parameter.numel() for parameter in load(Path(model)).parameters())
    assert 16 * num_parameters / 2 < num_bytes < 16 * num_parameters


def test_a_moment_that_does_not_come_back_is_noticed(model: str, kept: list[float]) -> None:
    lent, _ = run_ranks(_lend_and_take_back, 2, model, True, False, timeout_s=120)[0]
    assert lent != kept
