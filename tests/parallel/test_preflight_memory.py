"""Preflight's weights, gradients and optimizer state are those of real actors, counted tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.optimizer import single_optimizers
from megatron_fipo.config import (
    BatchSection,
    Config,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RolloutSection,
    TrainSection,
)
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.preflight.hardware import GIB
from megatron_fipo.preflight.memory import layer_activations, training_memory
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory
from tests.models import save_random_model
from tests.parallel.ranks import run_ranks

QUICKSTART = "examples/quickstart/base"
SMOLLM2: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's layers, two of its thirty, a twelfth of its vocabulary."""
TOLERANCE = 0.01
"""Megatron pads each parameter in a buffer to 64 numbers, and each buffer to its shards."""

ACTIVATION_TOLERANCE = 0.005
"""Statistics of the norms, of a few bytes, are not in the formula."""


@dataclass(frozen=True)
class Case:
    """A model in a layout."""

    name: str
    model: str
    dtype: str
    parallel: ParallelSection
    world_size: int
    distributed: bool = True


CASES = [
    Case("quickstart cp2", "quickstart", "float32", ParallelSection(cp=2), 2),
    Case("quickstart tp2", "quickstart", "float32", ParallelSection(tp=2), 2),
    Case("smollm2 bf16", "smollm2", "bfloat16", ParallelSection(), 1),
    Case("smollm2 bf16 dp2", "smollm2", "bfloat16", ParallelSection(), 2),
    Case("smollm2 bf16 dp2, whole state", "smollm2", "bfloat16", ParallelSection(), 2, distributed=False),
    Case("smollm2 pp2", "smollm2", "float32", ParallelSection(pp=2), 2),
]


def config_of(case: Case, folder: str) -> Config:
    return Config(
        model=ModelSection(path=folder, dtype=case.dtype),
        rollout=RolloutSection(num_prompts=2, num_samples_per_prompt=2, max_prompt_tokens=4, max_response_tokens=8),
        train=TrainSection(num_minibatches=1),
        optimizer=OptimizerSection(distributed=case.distributed),
        parallel=case.parallel,
        batch=BatchSection(max_tokens_per_microbatch=64),
    )


def groups_of_one_batch(num_response: int = 6) -> list[Group]:
    """Two groups of two responses."""
    ids = torch.arange(2, 8).repeat(num_response // 6 + 1)[:num_response]
    return [
        Group(
            Prompt(prompt, "made", "", (), "exact", None),
            [
                Trajectory.of_response(
                    prompt, i, ids[:2], ids, torch.zeros(num_response), "stop", advantage=1.0 - 2 * i
                )
                for i in range(2)
            ],
        )
        for prompt in range(2)
    ]


def distinct_bytes(tensors: list[Tensor]) -> int:
    """Bytes of the storages behind the tensors, each counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(case: Case, folder: str) -> tuple[int, dict[str, float], dict[str, float]]:
    """(pipeline stage, bytes counted, bytes that preflight says) after one update."""
    config = config_of(case, folder)
    ranks = parallel_groups.initialize(case.parallel, seed=0)
    actor = Actor(config, ranks)
    (microbatches,) = build_minibatches(groups_of_one_batch(), config, ranks, pad_token_id=0)
    for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=False):
        batch.old_log_probs = log_probs
    actor.update(microbatches, Objective(config.objective, ranks.cp), step=0)
    optimizers = single_optimizers(actor.optimizer)
    state = [
        value
        for each in optimizers
        for entry in each.optimizer.state.values()
        for value in entry.values()
        if isinstance(value, Tensor) and value.numel() > 1
    ]
    masters = [p for each in optimizers for group in each.optimizer.param_groups for p in group["params"]]
    weights = [parameter.data for model in actor.models for parameter in model.parameters()]
    gradients = [parameter.main_grad for model in actor.models for parameter in model.parameters()]  # type: ignore[attr-defined]
    counted = {
        "weights": sum(weight.numel() * weight.element_size() for weight in weights),
        "gradients": distinct_bytes(gradients),
        "optimizer": sum(value.numel() * value.element_size() for value in state)
        + (sum(p.numel() * p.element_size() for p in masters) if case.dtype == "bfloat16" else 0),
    }
    said = training_memory(config, read_model_shape(folder), case.world_size)[ranks.pp.rank()]
    expected = {name: getattr(said, name) * GIB for name in counted}
    return ranks.pp.rank(), counted, expected


Measured = list[tuple[int, dict[str, float], dict[str, float]]]


@cache
def measured(case: Case, folder: str) -> Measured:
    """What each rank measured."""
    return run_ranks(measure, case.world_size, case, folder, timeout_s=180)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    smollm2 = save_random_model(tmp_path_factory.mktemp("smollm2"), "llama", **SMOLLM2)
    return {"quickstart": str(Path(QUICKSTART).resolve()), "smollm2": str(smollm2)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bytes_are_those_of_the_actor(case: Case, folders: dict[str, str]) -> None:
    ranks = measured(case, folders[case.model])
    for name in ("weights", "gradients"):
        for stage, counted, expected in ranks:
            assert counted[name] == pytest.approx(expected[name], rel=TOLERANCE), f"{name} of stage {stage}"
    # State is sharded by buckets, whose parts differ in size from rank to rank: their sum is what counts.
    counted_state = sum(counted["optimizer"] for _, counted, _ in ranks)
    assert counted_state == pytest.approx(sum(expected["optimizer"] for *_, expected in ranks), rel=TOLERANCE)


def saved_bytes(folder: str, recompute: str, parallel: ParallelSection) -> float:
    """Bytes per token, on this rank, that an update's forward pass keeps for its backward, weights left out."""
    config = Config(
        model=ModelSection(path=folder, recompute=recompute),
        rollout=RolloutSection(num_prompts=2, num_samples_per_prompt=2, max_response_tokens=NUM_RESPONSE),
        train=TrainSection(num_minibatches=1),
        parallel=parallel,
    )
    ranks = parallel_groups.initialize(parallel, seed=0)
    actor = Actor(config, ranks)
    (microbatches,) = build_minibatches(groups_of_one_batch(NUM_RESPONSE), config, ranks, pad_token_id=0)
    (batch,) = microbatches
    (batch.old_log_probs,) = actor.log_probs(microbatches)
    weights = {parameter.untyped_storage().data_ptr() for model in actor.models for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given to another one
    counted: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage
        return tensor

    def loss(log_probs: Tensor, entropy: Tensor, batch: PackedBatch) -> LossOutput:
        counted.append(sum(storage.nbytes() for storage in storages.values()))
        return Objective(config.objective, ranks.cp)(log_probs, entropy, batch)

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        actor.update(microbatches, loss, step=0)
    parallel_groups.destroy_model_parallel()
    return counted[0] / len(batch.labels)


def saved_of_depths(folders: list[str], recompute: str, parallel: ParallelSection) -> list[float]:
    return [saved_bytes(folder, recompute, parallel) for folder in folders]


LAYERS = [
    ("none", ParallelSection()),
    ("selective", ParallelSection()),
    ("full", ParallelSection()),
    ("none", ParallelSection(tp=2)),
    ("none", ParallelSection(tp=2, sequence_parallel=True)),
    ("selective", ParallelSection(tp=2, sequence_parallel=True)),
    ("none", ParallelSection(cp=2)),
    ("selective", ParallelSection(cp=2)),
]
ODD_SIZES = SMOLLM2 | {
    "vocab_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_size": 256,
    "intermediate_size": 704,
}
"""No part of a layer is as wide as another, or one that is counted twice would stand in for one that is left out."""


NUM_RESPONSE = 62
"""Tokens behind two of a prompt."""


@pytest.fixture(scope="module")
def depths(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same model with two layers and with four."""
    root = tmp_path_factory.mktemp("depths")
    return [
        str(save_random_model(root / str(depth), "llama", **(ODD_SIZES | {"num_hidden_layers": depth})))
        for depth in (2, 4)
    ]


@pytest.mark.parametrize(
    ("recompute", "parallel"),
    LAYERS,
    ids=[f"{recompute} tp{layout.tp} cp{layout.cp} sp{int(layout.sequence_parallel)}" for recompute, layout in LAYERS],
)
def test_activations_of_a_layer_are_those_of_the_actor(
    recompute: str, parallel: ParallelSection, depths: list[str]
) -> None:
    """What two layers add to a model of two, so that everything outside of layers drops out."""
    shape = read_model_shape(depths[0])
    (shallow, deep), *_ = run_ranks(
        saved_of_depths, parallel.tp * parallel.cp, depths, recompute, parallel, timeout_s=180
    )
    config = Config(model=ModelSection(path=depths[0], recompute=recompute), parallel=parallel)
    # Where ranks share short sequences, each query also has a float32 mask over its sequence's 64 keys.
    mask = 4 * (2 + NUM_RESPONSE) if parallel.cp > 1 and recompute == "none" else 0
    kept = layer_activations(config, shape).kept + mask
    assert (deep - shallow) / 2 == pytest.approx(kept, rel=ACTIVATION_TOLERANCE)
    for other in {"none", "selective", "full"} - {recompute}:
        differently = replace(config, model=replace(config.model, recompute=other))
        wrong = layer_activations(differently, shape).kept
        assert (deep - shallow) / 2 != pytest.approx(wrong, rel=ACTIVATION_TOLERANCE), f"cannot be told from {other}"


def test_a_wrong_plan_is_noticed(folders: dict[str, str]) -> None:
    """bfloat16 without its float32 main weights, or a state that is not sharded, would be far off."""
    case = CASES[3]
    (_, counted, expected), _ = measured(case, folders[case.model])
    assert counted["optimizer"] != pytest.approx(expected["optimizer"] * 8 / 12, rel=TOLERANCE)
    assert counted["optimizer"] != pytest.approx(expected["optimizer"] * 2, rel=TOLERANCE)
