"""Training Qwen3, whose norms of q and k no other family has, is the same in every layout and in transformers.

Each tensor-parallel rank sees its own heads and the same norm: a gradient that is not summed over ranks would train
without an error.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_fipo.config import ParallelSection
from tests.models import load, save_random_model
from tests.parallel.layouts import Breakage, Case, Outcome, beyond, deviations, layout, train_actor, train_reference
from tests.parallel.ranks import run_ranks

P = ParallelSection
MODELS: dict[str, dict[str, Any]] = {
    "norms": {"head_dim": 16, "tie_word_embeddings": True},
    "norms and bias": {"head_dim": 16, "attention_bias": True},
}
LAYOUTS: dict[str, ParallelSection] = {
    "one": P(),
    "tp2": P(tp=2),
    "tp2 sp": P(tp=2, sequence_parallel=True),
    "pp2": P(pp=2),
    "cp2": P(cp=2),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen3")
    for name, changes in MODELS.items():
        save_random_model(root / name, "qwen3", **({"num_hidden_layers": 2} | changes))
    return root


@cache
def reference(folder: str) -> Outcome:
    return train_reference(folder, Case("", num_steps=1))


def _train(parallel: ParallelSection, folders: list[str], broken: bool = False) -> list[Outcome]:
    def norms_alone() -> Any:
        """Megatron sums what is marked for sequence parallelism or called a q or k norm; here, nothing is."""
        module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
        return mock.patch.object(module, "_allreduce_non_tensor_model_parallel_grads")

    case = Case("", parallel=parallel, distributed=False, num_steps=1)
    outcomes = []
    for folder in folders:
        with layout(parallel) as ranks:
            outcomes.append(train_actor(case, folder, ranks, Breakage(during=norms_alone) if broken else None))
    return outcomes


def _beyond(outcome: Outcome, folder: str) -> dict[str, float]:
    start = {name: tensor.detach() for name, tensor in load(Path(folder)).named_parameters()}
    assert outcome.gradients.keys() == start.keys()
    assert any("q_norm" in name for name in start)
    return beyond(deviations(outcome, reference(folder), start))


@pytest.mark.parametrize("key", LAYOUTS)
def test_qwen3_trains_as_in_transformers(root: Path, key: str) -> None:
    folders, parallel = [str(root / name) for name in MODELS], LAYOUTS[key]
    outcomes = run_ranks(_train, parallel.tp * parallel.pp * parallel.cp, parallel, folders)[0]
    for folder, outcome in zip(folders, outcomes, strict=True):
        assert _beyond(outcome, folder) == {}


def test_norms_whose_gradients_are_not_summed_are_noticed(root: Path) -> None:
    folder = str(root / "norms")
    (outcome,) = run_ranks(_train, 2, P(tp=2), [folder], True)[0]
    assert "gradients" in _beyond(outcome, folder)
