"""A forward that is computed again is the same: in backward, and in the update that starts from old log-probs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_fipo.actor import model as actor_model
from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import ParallelSection, RecomputedPart
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.rl.objective import LossOutput
from tests.parallel import layouts
from tests.parallel.layouts import (
    PAD_TOKEN,
    Case,
    Outcome,
    config_of,
    groups_of_step,
    layout,
    train_step,
    whole_weights,
)
from tests.parallel.ranks import run_ranks

P = ParallelSection


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return layouts.save_models(tmp_path_factory.mktemp("models"), num_layers=2)


def in_backward() -> bool:
    """Whether the autograd engine is at work."""
    return torch._C._current_graph_task_id() != -1


@dataclass
class Trained:
    """A step: the weights after it, bytes kept for backward, modules called in backward, and what an MLP's rows take.

    Attributes:
        mlp_bytes: of the step's rows through all layers: the first product, twice as wide as the second's input, and
            that input.
    """

    weights: dict[str, Tensor]
    kept: int
    called: list[str]
    mlp_bytes: int


def _train(case: Case, folder: str, part: RecomputedPart) -> Trained:
    kept: list[int] = []
    called: list[str] = []

    def keep(tensor: Tensor) -> Tensor:
        if not in_backward():
            kept.append(tensor.nbytes)
        return tensor

    def note(module: Any, arguments: Any) -> None:
        if in_backward():
            called.append(type(module).__name__)

    with layout(case.parallel) as ranks, mock.patch.object(actor_model, "recomputed_part", return_value=part):
        actor = Actor(config_of(case, folder), ranks)
        for module in actor.models[0].modules():
            module.register_forward_pre_hook(note)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train_step(actor, config_of(case, folder), 0, Outcome())
        minibatches = build_minibatches(groups_of_step(0), config_of(case, folder), ranks, PAD_TOKEN)
        rows = sum(int(batch.cu_seqlens_padded[-1]) for batches in minibatches for batch in batches)
        mlp_bytes = rows * actor.shape.num_layers * 3 * actor.shape.ffn_hidden_size // case.parallel.tp * 4
        return Trained(whole_weights(actor), sum(kept), called, mlp_bytes)


def _all_parts(case: Case, folder: str) -> dict[str, Trained]:
    parts: tuple[RecomputedPart, ...] = ("nothing", "mlp", "core_attn")
    return {part: _train(case, folder, part) for part in parts}


@pytest.mark.parametrize(
    ("case", "world_size"), [(Case("alone"), 1), (Case("tp2 sp", "llama", P(tp=2, sequence_parallel=True)), 2)]
)
def test_what_is_recomputed_is_the_part_that_is_named(case: Case, world_size: int, models: dict[str, str]) -> None:
    """The MLP, which GPUs recompute, runs here as there: by Megatron's own checkpoints, on other linear layers."""
    for trained in run_ranks(_all_parts, world_size, case, models[case.model], timeout_s=200):
        plain, mlp, attention = (trained[part] for part in ("nothing", "mlp", "core_attn"))
        for name, weight in plain.weights.items():
            assert torch.equal(mlp.weights[name], weight), name
            assert torch.equal(attention.weights[name], weight), name
        assert not plain.called
        assert set(attention.called) == {"ContextParallelAttention"}
        assert "MLP" in mlp.called
        assert "ContextParallelAttention" not in mlp.called
        assert plain.kept - mlp.kept >= plain.mlp_bytes
        assert plain.kept - attention.kept < plain.mlp_bytes


def _log_probs_twice(case: Case, folder: str) -> tuple[int, set[bool]]:
    """Old log-probs and those of the update that follows, compared; in which modes the model was called."""
    modes: set[bool] = set()
    config = config_of(case, folder)
    with layout(case.parallel) as ranks:
        actor = Actor(config, ranks)
        for module in actor.models[0].modules():
            module.register_forward_pre_hook(lambda module, arguments: modes.add(module.training))
        (first, *_) = build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN)
        for batch, log_probs in zip(first, actor.log_probs(first), strict=True):
            batch.old_log_probs = log_probs
        compared: list[bool] = []

        def loss_of(log_probs: Tensor, entropy: Tensor, batch: Any) -> LossOutput:
            compared.append(torch.equal(log_probs, batch.old_log_probs))
            return layouts._trainers_loss(config, ranks, [])(log_probs, entropy, batch)

        actor.update(first, loss_of, 0)
        assert all(compared)
        (again, *_) = build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN)
        moved = [torch.equal(a, b.old_log_probs) for a, b in zip(actor.log_probs(again), first, strict=True)]
        assert not any(moved), "an update that moves nothing proves nothing"
    return len(compared), modes


@pytest.mark.parametrize(("case", "world_size"), [(Case("alone"), 1), (Case("cp2", "llama", P(cp=2)), 2)])
def test_a_steps_first_ratio_is_one(case: Case, world_size: int, models: dict[str, str]) -> None:
    """Bit for bit, and by one mode: a kernel that asks for it, as Transformer Engine's do, is the same kernel."""
    for count, modes in run_ranks(_log_probs_twice, world_size, case, models[case.model], timeout_s=120):
        assert count > 1
        assert modes == {True}
