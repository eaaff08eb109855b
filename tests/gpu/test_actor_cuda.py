"""The actor on one GPU: the log-probs that a CPU computes, training steps, and weights that go in and out unchanged.

With Transformer Engine installed bfloat16 layers are its own, which is checked too; without it, and in float32, they
are Megatron's with this project's attention. Each test starts and ends torch.distributed, alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine as extension
from safetensors.torch import load_file
from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.backend import uses_transformer_engine
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint, load_checkpoint
from megatron_fipo.config import Config, ModelSection
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch
from tests.gpu.fp8_on_cpu import products_in_fp8
from tests.models import TINY, load, save_random_model
from tests.parallel.layouts import (
    LOG_PROB_CHUNK_MIB,
    PAD_TOKEN,
    TEMPERATURE,
    Case,
    Outcome,
    config_of,
    groups_of_step,
    train_reference,
    train_step,
    whole_weights,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "initializer_range": 0.05,
    "max_position_embeddings": 4096,
}
"""Heads of 64 channels: fused attention kernels want them so."""
FLOAT32_BOUND = 2e-4
"""Of any token's log-prob, TF32 being off: four layers of float32 products, summed in another order than on the CPU."""
BFLOAT16_BOUND = 1.2
"""Of the mean error of log-probs against float32, as a multiple of what transformers has in bfloat16 on the CPU."""
FP8_BOUND = 1.2
"""Of the mean difference of FP8's log-probs from bfloat16's, as a multiple of what rounding the operands does on the
CPU."""

needs_transformer_engine = pytest.mark.skipif(
    not extension.HAVE_TE, reason="Transformer Engine is not installed, or Megatron could not import it"
)


@pytest.fixture(params=["qwen2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tied = request.param == "qwen2"
    return save_random_model(tmp_path / "model", request.param, **SIZES, tie_word_embeddings=tied)


@pytest.fixture
def ranks() -> Iterator[ParallelGroups]:
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield parallel_groups.initialize(Case("gpu").parallel, seed=0)
    parallel_groups.shut_down()
    torch.set_float32_matmul_precision(precision)


def config_for(folder: Path, dtype: str = "float32", fp8: str = "none", **model: Any) -> Config:
    config = config_of(Case("gpu", max_tokens=400), str(folder))
    section = ModelSection(path=str(folder), dtype=dtype, fp8=fp8, log_prob_chunk_mib=LOG_PROB_CHUNK_MIB, **model)
    return replace(config, model=section)


def actor_log_probs(actor: Actor, config: Config, ranks: ParallelGroups) -> dict[int, Tensor]:
    """Log-probs of every sample's tokens, [P + R - 1], on the CPU."""
    found = {}
    for microbatches in build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN):
        for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=True):
            assert log_probs.is_cuda
            assert log_probs.dtype == torch.float32
            for row, index in enumerate(batch.sample_indices):
                if index >= 0:
                    start = int(batch.layout.cu_seqlens_padded[row])
                    length = int(batch.layout.cu_seqlens.diff()[row])
                    found[index] = log_probs[start : start + length - 1].cpu()
    return found


def cpu_log_probs(folder: Path, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The same by transformers on the CPU."""
    model, found = load(folder).to(dtype), []
    for sample in (sample for group in groups_of_step(0) for sample in group.samples):
        tokens = torch.cat([sample.prompt_ids, sample.response_ids])
        with torch.no_grad():
            log_p = F.log_softmax(model(tokens[None]).logits[0, :-1].float() / TEMPERATURE, dim=-1)
        found.append(log_p.gather(-1, tokens[1:, None]).squeeze(-1))
    return found


def test_float32_log_probs_are_those_of_the_cpu(folder: Path, ranks: ParallelGroups) -> None:
    config = config_for(folder)
    found, expected = actor_log_probs(Actor(config, ranks), config, ranks), cpu_log_probs(folder)
    assert found.keys() == set(range(len(expected)))
    errors = torch.cat([(found[index] - log_probs).abs() for index, log_probs in enumerate(expected)])
    assert float(errors.max()) <= FLOAT32_BOUND
    rounded = torch.cat(cpu_log_probs(folder, torch.bfloat16)) - torch.cat(expected)
    assert float(rounded.abs().max()) > FLOAT32_BOUND, "bfloat16 keeps the bound too, so it says nothing"


def test_bfloat16_log_probs_are_as_close_as_those_of_the_cpu(folder: Path, ranks: ParallelGroups) -> None:
    config = config_for(folder, "bfloat16")
    found, expected = actor_log_probs(Actor(config, ranks), config, ranks), cpu_log_probs(folder)
    ours = torch.cat([found[index] for index in range(len(expected))])
    rounded = torch.cat(cpu_log_probs(folder, torch.bfloat16)) - torch.cat(expected)
    allowed = BFLOAT16_BOUND * float(rounded.abs().mean())
    assert allowed / 10 < float((ours - torch.cat(expected)).abs().mean()) <= allowed
    misplaced = torch.cat([found[index].roll(1) for index in range(len(expected))])
    assert float((misplaced - torch.cat(expected)).abs().mean()) > 10 * allowed, "the bound notices nothing"


def test_a_step_is_that_of_one_cpu_process(folder: Path, ranks: ParallelGroups) -> None:
    """Three updates in float32: gradient norms to 1e-3, since kernels differ, and the weights follow."""
    config, outcome = config_for(folder), Outcome()
    actor = Actor(config, ranks)
    train_step(actor, config, 0, outcome)
    reference = train_reference(str(folder), Case("cpu", num_steps=1))
    for ours, theirs in zip(outcome.grad_norms, reference.grad_norms, strict=True):
        assert abs(ours - theirs) / theirs <= 1e-3
    start = {name: p.detach() for name, p in load(folder).named_parameters()}
    weights = {name: tensor.cpu() for name, tensor in whole_weights(actor).items()}
    apart = sum(float((weights[name] - w).double().square().sum()) for name, w in reference.weights.items())
    moved = sum(float((start[name] - w).double().square().sum()) for name, w in reference.weights.items())
    assert math.sqrt(apart / moved) <= 1e-2


def test_bfloat16_training_keeps_float32_main_weights(folder: Path, ranks: ParallelGroups) -> None:
    """Steps far below bfloat16's resolution add up: they would vanish if the weights themselves were bfloat16."""
    config = config_for(folder, "bfloat16")
    config = replace(config, optimizer=replace(config.optimizer, learning_rate=1e-6, weight_decay=0.0))
    actor = Actor(config, ranks)
    mains = [p for group in actor.optimizer.param_groups for p in group["params"]]
    assert {main.dtype for main in mains} == {torch.float32}
    before = [main.detach().clone() for main in mains]
    train_step(actor, config, 0, Outcome())
    moved = [float((main - old).abs().max()) for main, old in zip(mains, before, strict=True)]
    assert max(moved) <= 1e-5
    assert min(moved) > 0
    assert {tensor.dtype for _, tensor in actor.weights()} == {torch.bfloat16}


def test_what_comes_out_is_what_went_in(folder: Path, ranks: ParallelGroups) -> None:
    expected = load_file(folder / "model.safetensors")
    found = {name: tensor.cpu() for name, tensor in Actor(config_for(folder), ranks).weights()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_goes_on_from_its_checkpoint(folder: Path, ranks: ParallelGroups, tmp_path: Path, dtype: str) -> None:
    config = config_for(folder, dtype)
    unstopped, went_on = Outcome(), Outcome()
    actor = Actor(config, ranks)
    train_step(actor, config, 0, Outcome())
    saved = begin_checkpoint(
        actor, tmp_path / "checkpoints", 1, {"next_step": 1}, Keeping(last=1), asynchronous=False
    ).finish()
    train_step(actor, config, 1, unstopped)
    again = Actor(config, ranks)
    assert load_checkpoint(again, saved) == {"next_step": 1}
    train_step(again, config, 1, went_on)
    # Attention's backward adds up in no fixed order on a GPU, so not bit for bit.
    for ours, theirs in zip(went_on.grad_norms, unstopped.grad_norms, strict=True):
        assert abs(ours - theirs) / theirs <= (1e-4 if dtype == "float32" else 2e-2)


@needs_transformer_engine
def test_layers_are_transformer_engines_where_it_is_installed(folder: Path, ranks: ParallelGroups) -> None:
    assert uses_transformer_engine(ModelSection(dtype="bfloat16"))
    assert not uses_transformer_engine(ModelSection(dtype="float32"))
    actor = Actor(config_for(folder, "bfloat16"), ranks)
    assert any("transformer_engine" in type(module).__module__ for module in actor.models[0].modules())
    names = {name for name, _ in actor.models[0].named_parameters()}
    assert any(name.endswith("linear_qkv.layer_norm_weight") for name in names)


@needs_transformer_engine
def test_transformer_engines_layers_compute_what_megatrons_do(folder: Path, ranks: ParallelGroups) -> None:
    """Log-probs and a step in bfloat16, by either: both as far from float32 as bfloat16 is, and from each other."""
    expected = torch.cat(cpu_log_probs(folder))
    rounded = torch.cat(cpu_log_probs(folder, torch.bfloat16)) - expected
    allowed = BFLOAT16_BOUND * float(rounded.abs().mean())
    found, norms = {}, {}
    for engine in ("auto", "off"):
        config, outcome = config_for(folder, "bfloat16", transformer_engine=engine), Outcome()
        actor = Actor(config, ranks)
        by_sample = actor_log_probs(actor, config, ranks)
        found[engine] = torch.cat([by_sample[index] for index in range(len(by_sample))])
        train_step(actor, config, 0, outcome)
        norms[engine] = outcome.grad_norms
        del actor
    for log_probs in found.values():
        assert float((log_probs - expected).abs().mean()) <= allowed
    # Two errors of that size, independent at worst.
    assert 0 < float((found["auto"] - found["off"]).abs().mean()) <= 2 * allowed
    assert norms["auto"][0] == pytest.approx(norms["off"][0], rel=0.05)


@pytest.mark.parametrize("engine", ["off", pytest.param("auto", marks=needs_transformer_engine)])
def test_a_steps_first_ratio_is_one(folder: Path, ranks: ParallelGroups, engine: str) -> None:
    """Log-probs before the first update are those that it starts from, bit for bit: the same kernels, the same mode."""
    config = config_for(folder, "bfloat16", transformer_engine=engine)
    actor = Actor(config, ranks)
    (first, *_) = build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN)
    for batch, log_probs in zip(first, actor.log_probs(first), strict=True):
        batch.old_log_probs = log_probs
    same = []

    def loss_of(log_probs: Tensor, entropy: Tensor, batch: PackedBatch) -> LossOutput:
        assert batch.old_log_probs is not None
        same.append(torch.equal(log_probs, batch.old_log_probs))
        return Objective(config.objective, ranks.cp)(log_probs, entropy, batch)

    actor.update(first, loss_of, 0)
    assert len(same) == len(first)
    assert all(same)
    for batch, log_probs in zip(first, actor.log_probs(first), strict=True):
        assert not torch.equal(log_probs, batch.old_log_probs), "an update that moves nothing proves nothing"


@pytest.mark.parametrize(
    ("dtype", "engine"),
    [("float32", "off"), ("bfloat16", "off"), pytest.param("bfloat16", "auto", marks=needs_transformer_engine)],
)
def test_padding_between_sequences_changes_nothing(
    folder: Path, ranks: ParallelGroups, dtype: str, engine: str
) -> None:
    """Sequences packed with padding behind each, as context parallelism has them, against packed without."""
    config = config_for(folder, dtype, transformer_engine=engine)
    actor = Actor(config, ranks)
    tight = actor_log_probs(actor, config, ranks)
    padded = actor_log_probs(actor, replace(config, batch=replace(config.batch, pad_multiple=32)), ranks)
    assert padded.keys() == tight.keys()
    rounded = torch.cat(cpu_log_probs(folder, torch.bfloat16)) - torch.cat(cpu_log_probs(folder))
    allowed = FLOAT32_BOUND if dtype == "float32" else 2 * BFLOAT16_BOUND * float(rounded.abs().mean())
    apart = torch.cat([(padded[index] - log_probs).abs() for index, log_probs in tight.items()])
    assert float(apart.max() if dtype == "float32" else apart.mean()) <= allowed
    others = torch.cat([(padded[index].roll(1) - log_probs).abs() for index, log_probs in tight.items()])
    assert float(others.mean()) > 5 * allowed, "the bound notices nothing"


@needs_transformer_engine
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_update(folder: Path, ranks: ParallelGroups, recompute: str) -> None:
    norms = []
    for choice in ("none", recompute):
        config, outcome = config_for(folder, "bfloat16", recompute=choice), Outcome()
        train_step(Actor(config, ranks), config, 0, outcome)
        norms.append(outcome.grad_norms)
    for without, again in zip(*norms, strict=True):
        assert abs(again - without) / without <= 2e-2


@needs_transformer_engine
def test_gradients_added_in_the_products_are_those_added_behind_them(folder: Path, ranks: ParallelGroups) -> None:
    """Fused, they are summed in float32; else each microbatch's is rounded to bfloat16 first."""
    config, norms = config_for(folder, "bfloat16"), []
    for is_fused in (True, False):
        actor, outcome = Actor(config, ranks), Outcome()
        layers = [module for module in actor.models[0].modules() if hasattr(module, "fuse_wgrad_accumulation")]
        assert layers
        assert all(module.fuse_wgrad_accumulation for module in layers), "the actor has turned it on"
        for module in layers:
            module.fuse_wgrad_accumulation = is_fused  # type: ignore[assignment]
        train_step(actor, config, 0, outcome)
        norms.append(outcome.grad_norms)
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-2)
    assert norms[0] != norms[1], "the same numbers: nothing was fused"


@needs_transformer_engine
@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
def test_fp8_is_close_to_bfloat16_and_the_same_each_time(folder: Path, ranks: ParallelGroups, recipe: str) -> None:
    plain, rounded = config_for(folder, "bfloat16"), config_for(folder, "bfloat16", recipe)
    expected = actor_log_probs(Actor(plain, ranks), plain, ranks)
    actor = Actor(rounded, ranks)
    on_cpu = torch.cat(cpu_log_probs(folder, torch.bfloat16))
    with products_in_fp8(recipe, TINY["vocab_size"]):
        allowed = FP8_BOUND * float((torch.cat(cpu_log_probs(folder, torch.bfloat16)) - on_cpu).abs().mean())
    with products_in_fp8(recipe, TINY["vocab_size"], torch.float8_e5m2):
        coarser = float((torch.cat(cpu_log_probs(folder, torch.bfloat16)) - on_cpu).abs().mean())
    assert coarser > 1.2 * allowed, "the bound does not notice a bit less"
    first, again = (actor_log_probs(actor, rounded, ranks) for _ in range(2))
    errors = torch.cat([(first[index] - log_probs).abs() for index, log_probs in expected.items()])
    assert allowed / FP8_BOUND**2 <= float(errors.mean()) <= allowed
    # No history in the scales: what is computed again, as old log-probs and in the update, is the same.
    assert all(torch.equal(first[index], again[index]) for index in first)
    outcomes = []
    for config in (plain, rounded):
        outcome = Outcome()
        train_step(Actor(config, ranks), config, 0, outcome)
        outcomes.append(outcome.grad_norms)
    assert outcomes[1][0] == pytest.approx(outcomes[0][0], rel=0.1)
    assert outcomes[1][0] != outcomes[0][0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_lent_to_a_server_and_taken_back(folder: Path, ranks: ParallelGroups, dtype: str) -> None:
    """Colocated servers: nothing of the actor stays on the device, and training goes on as if nothing had been lent."""
    config, outcomes = config_for(folder, dtype), []
    for is_lent in (False, True):
        actor, outcome = Actor(config, ranks), Outcome()
        train_step(actor, config, 0, outcome)
        for _ in range(2 if is_lent else 0):  # the second time the host's memory is there already
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            actor.offload()
            assert before - torch.cuda.memory_allocated() >= 12 * actor.num_parameters, "weights and Adam's two moments"
            actor.onload()
        train_step(actor, config, 1, outcome)
        outcomes.append(outcome.grad_norms)
        del actor
    # Attention's backward adds up in no fixed order on a GPU, so not bit for bit.
    for kept, lent in zip(*outcomes, strict=True):
        assert abs(lent - kept) / kept <= (1e-4 if dtype == "float32" else 2e-2)


def test_a_checkpoint_is_written_beside_training(folder: Path, ranks: ParallelGroups, tmp_path: Path) -> None:
    config = config_for(folder)
    actor, outcome = Actor(config, ranks), Outcome()
    train_step(actor, config, 0, outcome)
    kept = whole_weights(actor)
    pending = begin_checkpoint(actor, tmp_path / "checkpoints", 1, {"next_step": 1}, Keeping(last=1))
    train_step(actor, config, 1, outcome)
    again = Actor(config, ranks)
    assert load_checkpoint(again, pending.finish()) == {"next_step": 1}
    assert all(torch.equal(kept[name], weight) for name, weight in whole_weights(again).items())
