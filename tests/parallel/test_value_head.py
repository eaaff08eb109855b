"""A trained model with another head: one value for each token, from parameters of its own.

The head is defined here, as its own module in the package would be. Everything else is the real trained model: its
update must move head and body as torch's does in one process, the head's weights must lie in the checkpoint and come
back in another layout, and rollout engines must never be given them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fipo.actor.hidden_states import HiddenStateModel
from megatron_fipo.actor.trained import TrainedModel
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint, load_checkpoint
from megatron_fipo.config import Config, ParallelSection
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.metrics.reductions import Mean, Metrics
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.token_values import BySequence, gather_token_values
from megatron_fipo.rl.packed_batch import PackedBatch
from tests.models import load
from tests.parallel.layouts import (
    GRADIENT_BOUND,
    PAD_TOKEN,
    WEIGHT_BOUND,
    Case,
    config_of,
    groups_of_step,
    layout,
    save_models,
)
from tests.parallel.ranks import run_ranks
from tests.parallel.test_data_parallel import overlapping

P = ParallelSection
SEQUENCE_PARALLEL = P(tp=2, sequence_parallel=True)
LAYOUTS = {"qwen2": [SEQUENCE_PARALLEL, P(pp=2), P()], "llama": [P(tp=2), P(pp=2), P(cp=2)]}
"""On two ranks; what the layout leaves is data parallel. The output layer of the first model is its embedding, the
second has one of its own: a value head needs neither."""
VALUE_BOUND = 1e-5


def _first_weights(width: int) -> Tensor:
    """[1, H]: not zero, or the first update would leave the body where it is."""
    return torch.linspace(-0.5, 0.5, width)[None]


class Values(NamedTuple):
    values: Tensor


class ValueHead:
    """One scalar for each token; a `Head`."""

    uses_output_layer = False

    def own_module(self, config: TransformerConfig) -> nn.Module:
        linear = nn.Linear(config.hidden_size, 1, dtype=config.params_dtype)
        with torch.no_grad():
            linear.weight.copy_(_first_weights(config.hidden_size))
            linear.bias.zero_()
        for parameter in linear.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return linear

    def __call__(self, hidden: Tensor, batch: PackedBatch, model: HiddenStateModel) -> Values:
        values = model.head(hidden.squeeze(1))
        if model.config.sequence_parallel:  # the loss is the same on every rank, so its gradient is not summed
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return Values(values.squeeze(-1).float())


@dataclass(frozen=True)
class SquaredError:
    loss_sum: Tensor
    normalizer: Tensor
    metrics: Metrics


def target_of(positions: Tensor) -> Tensor:
    """Something to fit."""
    return torch.sin(positions.float())


def squared_error(values: Tensor, batch: PackedBatch) -> SquaredError:
    errors = ((values - target_of(batch.position_ids)) ** 2)[batch.response_mask]
    metrics: Metrics = {"critic/loss": Mean(errors.detach().sum(), len(errors))}
    return SquaredError(errors.sum(), torch.tensor(len(errors)), metrics)


@dataclass
class Trained:
    """A critic after one step of two updates."""

    values: BySequence
    """Before the step."""
    grad_norms: list[float]
    weights: dict[str, Tensor]
    """After it, under Hugging Face names."""
    head: dict[str, Tensor]


def _critic(config: Config, ranks: ParallelGroups) -> TrainedModel[Values]:
    return TrainedModel(config, ranks, read_model_shape(config.model.path), ValueHead())


def _head_of(critic: TrainedModel[Values], ranks: ParallelGroups) -> dict[str, Tensor]:
    """The head's parameters, which the ranks of the last stage alone have and must agree in. Collective."""
    own = {
        name.removeprefix("head."): parameter.detach().clone()
        for model in critic.models
        for name, parameter in model.named_parameters()
        if name.startswith("head.")
    }
    assert bool(own) == ranks.is_last_stage
    found = [part for part in exchange.all_gather_objects(own, ranks.world) if part]
    for other in found:
        assert all(torch.equal(other[name], value) for name, value in found[0].items()), "ranks have other heads"
    return found[0]


def _train(critic: TrainedModel[Values], config: Config, ranks: ParallelGroups, step: int) -> Trained:
    minibatches = build_minibatches(groups_of_step(step), config, ranks, PAD_TOKEN)
    batches = [batch for microbatches in minibatches for batch in microbatches]
    found = [outputs.values for microbatches in minibatches for outputs in critic.forward(microbatches)]
    values = gather_token_values(batches, found, ranks)
    norms = [critic.update(microbatches, squared_error, step).grad_norm for microbatches in minibatches]
    weights = {name: tensor.clone() for name, tensor in critic.weights()}
    return Trained(values, norms, weights, _head_of(critic, ranks))


def _by_torch(folder: str) -> Trained:
    """The same step by transformers and torch in one process."""
    config = config_of(Case("critic"), folder)
    model = load(Path(folder))
    head = nn.Linear(model.config.hidden_size, 1)
    with torch.no_grad():
        head.weight.copy_(_first_weights(model.config.hidden_size))
        head.bias.zero_()
    body = {name: p for name, p in model.named_parameters() if name != "lm_head.weight"}
    parameters = [*body.values(), *head.parameters()]
    section = config.optimizer
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": section.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=section.learning_rate,
        betas=(section.adam_beta1, section.adam_beta2),
        eps=section.adam_epsilon,
    )

    def values_of(tokens: Tensor) -> Tensor:
        hidden = model(tokens[None], output_hidden_states=True).hidden_states[-1][0]
        return head(hidden).squeeze(-1)

    samples = [sample for group in groups_of_step(0) for sample in group.samples]
    rows = [torch.arange(len(s.prompt_ids) - 1, s.num_tokens - 1) for s in samples]
    tokens = [torch.cat([s.prompt_ids, s.response_ids]) for s in samples]
    with torch.no_grad():
        values = {i: (rows[i], values_of(tokens[i])[rows[i]]) for i in range(len(samples))}
    norms = []
    per_minibatch = len(samples) // config.train.num_minibatches
    for first in range(0, len(samples), per_minibatch):
        errors = [
            (values_of(tokens[i])[rows[i]] - target_of(rows[i])) ** 2 for i in range(first, first + per_minibatch)
        ]
        optimizer.zero_grad()
        torch.cat(errors).mean().backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, section.gradient_clip)))
        optimizer.step()
    return Trained(
        values,
        norms,
        {name: p.detach().clone() for name, p in body.items()},
        {name: p.detach().clone() for name, p in head.named_parameters()},
    )


def apart(found: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """||difference|| / ||distance that the expected ones have moved||."""
    assert found.keys() == expected.keys()
    difference = sum(float((found[name] - value).double().square().sum()) for name, value in expected.items())
    moved = sum(float((start[name] - value).double().square().sum()) for name, value in expected.items())
    return (difference / moved) ** 0.5


# --- what runs on the ranks ------------------------------------------------------------------------------------------


def _unmarked(self: ValueHead, config: TransformerConfig) -> nn.Module:
    linear = _OWN_MODULE(self, config)
    for parameter in linear.parameters():
        parameter.sequence_parallel = False  # type: ignore[attr-defined]
    return linear


_OWN_MODULE: Callable[[ValueHead, TransformerConfig], nn.Module] = ValueHead.own_module


def _trained_in(parallel: ParallelSection, folder: str) -> Trained:
    config = config_of(Case("critic", parallel=parallel), folder)
    with layout(parallel) as ranks:
        return _train(_critic(config, ranks), config, ranks, 0)


def _kept_output_layer(folder: str) -> str:
    """Where Megatron stops at a parameter without a gradient, if sums of gradients go on during backward."""
    with overlapping():
        _trained_in(P(), folder)  # without the output layer nothing is said
        with mock.patch.object(ValueHead, "uses_output_layer", True):
            try:
                _trained_in(P(), folder)
            except AssertionError:
                return traceback.format_exc()
    return ""


def _save_and_go_on(folder: str, checkpoints: str) -> dict[str, Trained]:
    """The second step of a run that is not stopped, of one that goes on elsewhere, and of one that forgot its head."""
    found, saved_in, loaded_in = {}, P(pp=2), P(tp=2)
    config = config_of(Case("critic", parallel=saved_in), folder)
    with layout(saved_in) as ranks:
        critic = _critic(config, ranks)
        _train(critic, config, ranks, 0)
        begin_checkpoint(critic, checkpoints, 1, {"next_step": 1}, Keeping(), asynchronous=False).finish()
        found["unstopped"] = _train(critic, config, ranks, 1)
    config = config_of(Case("critic", parallel=loaded_in), folder)
    for name in ("resumed", "head forgotten"):
        with layout(loaded_in) as ranks:
            critic = _critic(config, ranks)
            fresh = _head_of(critic, ranks)
            assert load_checkpoint(critic, Path(checkpoints) / "step_000001") == {"next_step": 1}
            if name == "head forgotten":
                critic.models[-1].head.load_state_dict(fresh)
            found[name] = _train(critic, config, ranks, 1)
    return found


@dataclass
class OfTwoRanks:
    trained: list[list[Trained]]
    """[model][layout]."""
    not_marked: Trained
    kept_output_layer: str
    went_on: dict[str, Trained]


def _on_two_ranks(folders: Sequence[str], checkpoints: str) -> OfTwoRanks:
    tied, untied = folders
    layouts = zip(folders, LAYOUTS.values(), strict=True)
    trained = [[_trained_in(parallel, folder) for parallel in of_model] for folder, of_model in layouts]
    went_on = _save_and_go_on(untied, checkpoints)
    return OfTwoRanks(trained, _not_marked(tied), _kept_output_layer(untied), went_on)


def _not_marked(folder: str) -> Trained:
    with mock.patch.object(ValueHead, "own_module", _unmarked), mock.patch(f"{__name__}._head_of", return_value={}):
        return _trained_in(SEQUENCE_PARALLEL, folder)


def _on_four_ranks(folders: Sequence[str]) -> list[list[Trained]]:
    return [[_trained_in(P(pp=2, virtual_pp=2), folder)] for folder in folders]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    saved = save_models(tmp_path_factory.mktemp("models"))
    return [saved[name] for name in LAYOUTS]


@pytest.fixture(scope="module")
def of_two_ranks(folders: list[str], tmp_path_factory: pytest.TempPathFactory) -> OfTwoRanks:
    return run_ranks(_on_two_ranks, 2, folders, str(tmp_path_factory.mktemp("critic")), timeout_s=200)[0]


# --- the tests -------------------------------------------------------------------------------------------------------


def _same_as_by_torch(found: list[list[Trained]], folders: list[str]) -> None:
    for folder, of_layouts in zip(folders, found, strict=True):
        expected, start = _by_torch(folder), load(Path(folder)).state_dict()
        first = {"weight": _first_weights(expected.head["weight"].shape[1]), "bias": torch.zeros(1)}
        for critic in of_layouts:
            assert critic.values.keys() == expected.values.keys()
            for key, (positions, values) in expected.values.items():
                assert torch.equal(critic.values[key][0], positions)
                assert torch.allclose(critic.values[key][1], values, rtol=0, atol=VALUE_BOUND)
            for ours, theirs in zip(critic.grad_norms, expected.grad_norms, strict=True):
                assert abs(ours - theirs) / theirs <= GRADIENT_BOUND
            assert apart(critic.weights, expected.weights, start) <= WEIGHT_BOUND
            assert apart(critic.head, expected.head, first) <= WEIGHT_BOUND


def test_a_critic_is_trained_on_two_ranks_as_by_torch(of_two_ranks: OfTwoRanks, folders: list[str]) -> None:
    _same_as_by_torch(of_two_ranks.trained, folders)


def test_a_critic_is_trained_in_an_interleaved_pipeline_as_by_torch(folders: list[str]) -> None:
    _same_as_by_torch(run_ranks(_on_four_ranks, 4, folders, timeout_s=200)[0], folders)


def test_a_head_that_is_not_marked_for_sequence_parallelism_is_noticed(of_two_ranks: OfTwoRanks) -> None:
    right = of_two_ranks.trained[0][0]
    off = abs(of_two_ranks.not_marked.grad_norms[0] - right.grad_norms[0]) / right.grad_norms[0]
    assert off > 100 * GRADIENT_BOUND


def test_an_output_layer_that_nobody_reads_would_stop_sums_during_backward(of_two_ranks: OfTwoRanks) -> None:
    assert "param_and_grad_buffer.py" in of_two_ranks.kept_output_layer


def test_a_critic_is_saved_and_goes_on_in_another_layout(of_two_ranks: OfTwoRanks) -> None:
    unstopped, resumed, forgotten = (of_two_ranks.went_on[name] for name in ("unstopped", "resumed", "head forgotten"))

    def off(found: Trained) -> float:
        return max(abs(a - b) / b for a, b in zip(found.grad_norms, unstopped.grad_norms, strict=True))

    assert off(resumed) <= GRADIENT_BOUND < off(forgotten) / 100
    for key, (_, values) in unstopped.values.items():
        assert torch.allclose(resumed.values[key][1], values, rtol=0, atol=VALUE_BOUND)
    for name, value in unstopped.head.items():
        assert torch.allclose(resumed.head[name], value, rtol=0, atol=VALUE_BOUND)
        assert not torch.allclose(forgotten.head[name], value, rtol=0, atol=100 * VALUE_BOUND)


def test_engines_are_given_no_head(of_two_ranks: OfTwoRanks, folders: list[str]) -> None:
    for folder, of_layouts in zip(folders, of_two_ranks.trained, strict=True):
        names = load(Path(folder)).state_dict().keys() - {"lm_head.weight"}
        assert all(critic.weights.keys() - {"lm_head.weight"} == names for critic in of_layouts)
