"""The actor in bfloat16, on the CPU: float32 main weights, log-probs within rounding, checkpoints that go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint, load_checkpoint
from megatron_fipo.config import Config, ModelSection, ParallelSection
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.batch import build_minibatches
from tests.models import load
from tests.parallel.layouts import (
    LOG_PROB_CHUNK_MIB,
    PAD_TOKEN,
    TEMPERATURE,
    Case,
    Outcome,
    config_of,
    groups_of_step,
    layout,
    save_models,
    train_step,
    whole_weights,
)
from tests.parallel.ranks import run_ranks

P = ParallelSection
LAYOUTS = {"tp2 sp": P(tp=2, sequence_parallel=True), "cp2": P(cp=2), "pp2": P(pp=2), "dp2": P()}
ERROR_BOUND = 1.2
"""Of the mean error of log-probs against float32, as a multiple of what transformers has in bfloat16."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_models(tmp_path_factory.mktemp("models"), num_layers=2)


def _config(folder: str, parallel: ParallelSection, *, distributed: bool, learning_rate: float = 1e-3) -> Config:
    config = config_of(Case("", parallel=parallel, distributed=distributed), folder)
    return replace(
        config,
        model=ModelSection(path=folder, dtype="bfloat16", log_prob_chunk_mib=LOG_PROB_CHUNK_MIB),
        optimizer=replace(config.optimizer, learning_rate=learning_rate, weight_decay=0.0),
    )


def _log_probs(folder: str) -> dict[str, dict[tuple[int, int], float]] | None:
    """(sample, position) -> log-prob of the token after it, by layout."""
    by_layout = {}
    for name, parallel in LAYOUTS.items():
        config = _config(folder, parallel, distributed=True)
        own: dict[tuple[int, int], float] = {}
        with layout(parallel) as ranks:
            actor = Actor(config, ranks)
            assert {tensor.dtype for _, tensor in actor.weights()} == {torch.bfloat16}
            for microbatches in build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN):
                for batch, found in zip(microbatches, actor.log_probs(microbatches), strict=ranks.is_last_stage):
                    assert found.dtype == torch.float32
                    samples = torch.tensor(batch.sample_indices)[batch.sequence_ids]
                    rows = zip(samples.tolist(), batch.position_ids.tolist(), found.tolist(), strict=True)
                    own |= {(sample, position): value for sample, position, value in rows}
            parts = exchange.all_gather_objects(own, ranks.world)
        by_layout[name] = {place: value for part in parts for place, value in part.items()}
    return by_layout if dist.get_rank() == 0 else None


def _transformers_log_probs(folder: str, dtype: torch.dtype) -> list[Tensor]:
    """Each sample's, [P + R - 1]."""
    network, found = load(Path(folder)).to(dtype), []
    for sample in (sample for group in groups_of_step(0) for sample in group.samples):
        tokens = torch.cat([sample.prompt_ids, sample.response_ids])
        with torch.no_grad():
            log_p = F.log_softmax(network(tokens[None]).logits[0, :-1].float() / TEMPERATURE, dim=-1)
        found.append(log_p.gather(-1, tokens[1:, None]).squeeze(-1))
    return found


def test_log_probs_are_as_close_to_float32_as_those_of_transformers(models: dict[str, str]) -> None:
    by_layout = run_ranks(_log_probs, 2, models["qwen2"], timeout_s=120)[0]
    exact = _transformers_log_probs(models["qwen2"], torch.float32)
    rounded = _transformers_log_probs(models["qwen2"], torch.bfloat16)
    allowed = ERROR_BOUND * float((torch.cat(rounded) - torch.cat(exact)).abs().mean())
    for name, found in by_layout.items():
        ours = [
            torch.tensor([found[index, position] for position in range(len(expected))])
            for index, expected in enumerate(exact)
        ]
        error = float((torch.cat(ours) - torch.cat(exact)).abs().mean())
        assert allowed / 10 < error <= allowed, name
        misplaced = torch.cat([own.roll(1) for own in ours])
        assert float((misplaced - torch.cat(exact)).abs().mean()) > 10 * allowed, f"{name}: the bound notices nothing"


def _main_weights(actor: Actor) -> list[Tensor]:
    return [p for group in actor.optimizer.param_groups for p in group["params"]]


def _config_of_one_microbatch(
    folder: str, parallel: ParallelSection, *, distributed: bool, learning_rate: float = 1e-3
) -> Config:
    """How an update is cut into microbatches is nothing to its optimizer."""
    config = _config(folder, parallel, distributed=distributed, learning_rate=learning_rate)
    return replace(config, batch=replace(config.batch, max_tokens_per_microbatch=400))


def _train_a_little(folder: str, distributed: bool) -> None:
    """Steps of 1e-6 are far below bfloat16's resolution: they add up in float32 main weights or not at all."""
    for parallel in (P(tp=2), P()):
        config = _config_of_one_microbatch(folder, parallel, distributed=distributed, learning_rate=1e-6)
        with layout(parallel) as ranks:
            actor = Actor(config, ranks)
            mains = _main_weights(actor)
            assert {main.dtype for main in mains} == {torch.float32}
            before = [main.detach().clone() for main in mains]
            for step in range(2):
                train_step(actor, config, step, Outcome())
            moved = torch.cat([(main - old).abs().flatten() for main, old in zip(mains, before, strict=True)])
            assert 3.4e-6 < float(moved.max()) <= 4.06e-6  # four updates of at most one learning rate each


def _go_on(folder: str, checkpoints: str, distributed: bool) -> None:
    """After one step, and before any: what goes on from a checkpoint is what was never stopped, bit for bit."""
    for num_steps in (0, 1):
        config = _config_of_one_microbatch(folder, P(tp=2), distributed=distributed)
        with layout(P(tp=2)) as ranks:
            actor, unstopped, went_on = Actor(config, ranks), Outcome(), Outcome()
            for step in range(num_steps):
                train_step(actor, config, step, Outcome())
            saved = begin_checkpoint(
                actor, checkpoints, num_steps, {"next_step": num_steps}, Keeping(last=1), asynchronous=False
            ).finish()
            train_step(actor, config, num_steps, unstopped)
            again = Actor(config, ranks)
            assert load_checkpoint(again, saved) == {"next_step": num_steps}
            train_step(again, config, num_steps, went_on)
            assert went_on.grad_norms == unstopped.grad_norms
            for ours, theirs in zip(_main_weights(again), _main_weights(actor), strict=True):
                assert torch.equal(ours, theirs)
            expected = whole_weights(actor)
            assert all(torch.equal(tensor, expected[name]) for name, tensor in again.weights())


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded optimizer", "whole optimizer"])
def test_main_weights_are_float32(models: dict[str, str], distributed: bool) -> None:
    run_ranks(_train_a_little, 2, models["qwen2"], distributed, timeout_s=120)


@pytest.mark.parametrize("distributed", [True, False], ids=["sharded optimizer", "whole optimizer"])
def test_a_run_goes_on_exactly(models: dict[str, str], tmp_path: Path, distributed: bool) -> None:
    run_ranks(_go_on, 2, models["qwen2"], str(tmp_path), distributed, timeout_s=120)
