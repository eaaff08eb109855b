"""An actor that trains something else than all its weights: low-rank matrices beside frozen ones.

They are defined here, as their own module in the package would be, for models whose tensors are not split. Everything
else is the real actor: what is frozen must not move, engines must be given the merged weights, and a checkpoint must
hold what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.hidden_states import HiddenStateModel
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint, load_checkpoint
from megatron_fipo.config import ParallelSection
from tests.models import load
from tests.parallel.layouts import GRADIENT_BOUND, Case, Outcome, config_of, layout, save_models, train_step
from tests.parallel.ranks import run_ranks

P = ParallelSection
LAYOUTS = [P(), P(pp=2)]
"""On two ranks. The first saves, all go on."""
RANK = 2
ADAPTED = "linear_fc2"
SEQUENCES = [[2, 5, 7, 11, 13, 3], [19, 4, 8, 6]]


@dataclass(frozen=True)
class LowRank:
    """Two thin matrices beside each MLP's second one; a `Trainable`."""

    sign: float = 1.0

    def prepare(self, model: HiddenStateModel) -> None:
        model.requires_grad_(False)
        for _, module in _adapted(model):
            width, generator = module.weight.shape[1], torch.Generator().manual_seed(0)
            module.low_a = nn.Parameter(torch.randn(RANK, width, generator=generator) / width**0.5)
            module.low_b = nn.Parameter(torch.zeros(module.weight.shape[0], RANK))
            module.register_forward_hook(_beside)

    def weights(self, model: HiddenStateModel) -> Iterator[tuple[str, Tensor]]:
        changes = {f"{name}.weight": self.sign * module.low_b @ module.low_a for name, module in _adapted(model)}
        for name, parameter in model.named_parameters():
            if not name.endswith(("low_a", "low_b")):
                yield name, parameter + changes[name] if name in changes else parameter


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if name.endswith(ADAPTED)]


def _beside(module: Any, arguments: tuple[Tensor], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return output[0] + arguments[0] @ module.low_a.T @ module.low_b.T, output[1]


@dataclass
class GoneOn:
    """A run after a second step."""

    grad_norms: list[float]
    scores: list[list[float]]
    weights: dict[str, Tensor]
    wrongly_merged: dict[str, Tensor]
    moved: set[str]
    """Parameters that are not what they were before the first step."""


def _go_on(actor: Actor, config: Any, before: dict[str, Tensor]) -> GoneOn:
    outcome = Outcome()
    train_step(actor, config, 1, outcome)
    weights = {name: tensor.clone() for name, tensor in actor.weights()}
    actor._trainable = LowRank(sign=-1.0)
    wrongly = {name: tensor.clone() for name, tensor in actor.weights()}
    moved = {name for name, value in _parameters(actor).items() if not torch.equal(value, before[name])}
    return GoneOn(outcome.grad_norms, actor.score(SEQUENCES), weights, wrongly, moved)


def _parameters(actor: Actor) -> dict[str, Tensor]:
    return {name: p.detach().clone() for model in actor.models for name, p in model.named_parameters()}


def _train(folder: str, checkpoints: str, layouts: Sequence[ParallelSection]) -> list[GoneOn]:
    """The unstopped run, and one that goes on in each layout."""
    found = []
    config = config_of(Case("low rank", parallel=layouts[0]), folder)
    with layout(layouts[0]) as ranks:
        actor = Actor(config, ranks, LowRank())
        before = _parameters(actor)
        train_step(actor, config, 0, Outcome())
        begin_checkpoint(actor, checkpoints, 1, {"next_step": 1}, Keeping(), asynchronous=False).finish()
        found.append(_go_on(actor, config, before))
    for parallel in layouts:
        config = config_of(Case("low rank", parallel=parallel), folder)
        with layout(parallel) as ranks:
            actor = Actor(config, ranks, LowRank())
            before = _parameters(actor)
            load_checkpoint(actor, Path(checkpoints) / "step_000001")
            found.append(_go_on(actor, config, before))
    return found


def _by_transformers(folder: str, weights: dict[str, Tensor]) -> list[list[float]]:
    model, found = load(Path(folder)), []
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}  # tied to the embedding
    with torch.no_grad():
        for sequence in SEQUENCES:
            tokens = torch.tensor(sequence)
            log_p = torch.log_softmax(model(tokens[None]).logits[0, :-1], -1)
            found.append(log_p.gather(-1, tokens[1:, None]).squeeze(-1).tolist())
    return found


def test_what_is_trained_is_merged_saved_and_gone_on_with(tmp_path: Path) -> None:
    folder = save_models(tmp_path)["qwen2"]
    by_rank = run_ranks(_train, 2, folder, str(tmp_path / "checkpoints"), LAYOUTS, timeout_s=200)
    unstopped = by_rank[0][0]
    for of_rank in by_rank:
        for found in of_rank:
            assert found.moved
            assert all(name.endswith(("low_a", "low_b")) for name in found.moved), "what is frozen moved"
            assert found.grad_norms == pytest.approx(unstopped.grad_norms, rel=GRADIENT_BOUND)
            for ours, merged, wrong in zip(
                found.scores,
                _by_transformers(folder, found.weights),
                _by_transformers(folder, found.wrongly_merged),
                strict=True,
            ):
                assert ours == pytest.approx(merged, abs=1e-5)
                assert ours != pytest.approx(wrong, abs=1e-3)
