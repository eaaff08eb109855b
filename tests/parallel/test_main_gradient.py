"""Training is the same where the output layer's gradient goes straight into Megatron's buffer, as it does on CUDA.

The whole training of `layouts`, against transformers in one process: with an output layer of its own, tied to the
embedding on one stage and over two, under tensor and sequence parallelism, data parallel and with overlapped reduction.
What stands for the gradient in autograd is poisoned with NaN, so that nothing may come of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import vocab_log_probs as module
from tests.models import load
from tests.parallel import layouts
from tests.parallel.layouts import Breakage, Case, Outcome, beyond, deviations, layout
from tests.parallel.ranks import run_ranks

P = ParallelSection
CASES: dict[int, list[Case]] = {
    1: [Case("tied", distributed=False), Case("own", "llama", distributed=False), Case("own, sharded", "llama")],
    2: [
        Case("tied, tp2 sp", parallel=P(tp=2, sequence_parallel=True), distributed=False),
        Case("own, tp2", "llama", P(tp=2)),
        Case("tied, pp2", parallel=P(pp=2), distributed=False),
        Case("own, pp2", "llama", P(pp=2)),
        Case("tied, dp2", distributed=False, max_tokens=80),
    ],
}


ALREADY_ADDED = module._already_added


def poisoned(weight: Tensor) -> Tensor | None:
    """What `_already_added` returns, of NaNs."""
    stand_in = ALREADY_ADDED(weight)
    return None if stand_in is None else stand_in.fill_(torch.nan)


@contextmanager
def into_the_buffer(already_added: Any = poisoned) -> Iterator[None]:
    """On the CPU too."""
    with (
        mock.patch.object(module, "_ADDS_TO_MAIN_GRADIENT", ("cpu",)),
        mock.patch.object(module, "_already_added", already_added),
    ):
        yield


def overlapping(actor: Actor) -> None:
    """Gradients are reduced as soon as the last microbatch has them."""
    for chunk in actor._chunks:
        chunk.ddp_config.overlap_grad_reduce = True  # type: ignore[union-attr]
        get_model_config(chunk).no_sync_func = chunk.no_sync


def _train(cases: list[Case], folders: dict[str, str], already_added: Any, overlaps: bool = False) -> list[Outcome]:
    outcomes = []
    for case in cases:
        actor = overlapping if overlaps else lambda actor: None
        breakage = Breakage(during=lambda: into_the_buffer(already_added), actor=actor)
        with layout(case.parallel) as ranks:
            outcomes.append(layouts.train_actor(case, folders[case.model], ranks, breakage))
    return outcomes if dist.get_rank() == 0 else []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return layouts.save_models(tmp_path_factory.mktemp("models"), num_layers=2)


@cache
def reference(folder: str, num_steps: int) -> Outcome:
    """The same for all cases of a model: they differ in layout and packing alone."""
    return layouts.train_reference(folder, Case("reference", num_steps=num_steps))


def found(case: Case, outcome: Outcome, folders: dict[str, str]) -> dict[str, float]:
    folder = folders[case.model]
    start = {name: p.detach() for name, p in load(Path(folder)).named_parameters()}
    return beyond(deviations(outcome, reference(folder, case.num_steps), start))


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_training_is_that_of_one_process(folders: dict[str, str], world_size: int, overlaps: bool) -> None:
    cases = CASES[world_size]
    outcomes = run_ranks(_train, world_size, cases, folders, poisoned, overlaps, timeout_s=240)[0]
    for case, outcome in zip(cases, outcomes, strict=True):
        assert found(case, outcome, folders) == {}, case.name


def not_marked(weight: Tensor) -> Tensor:
    """Megatron adds the stand-in as well."""
    return torch.full_like(weight, 1e-3)


def joining_the_embeddings(weight: Tensor) -> Tensor:
    """What stands for the gradient joins the embedding's where they are tied."""
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.full_like(weight, 1e-3)


def dropping_the_embeddings(weight: Tensor) -> None:
    """The embedding's gradient is taken for one that is in the buffer already."""
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = True, False  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("case", "mistake"),
    [
        (CASES[1][1], not_marked),
        (CASES[1][0], not_marked),
        (CASES[1][0], joining_the_embeddings),
        (CASES[1][0], dropping_the_embeddings),
    ],
    ids=lambda value: getattr(value, "name", None) or value.__name__,
)
def test_a_mistake_is_noticed(folders: dict[str, str], case: Case, mistake: Any) -> None:
    case = replace(case, num_steps=1)  # it shows in the first update's gradients
    (outcome,) = run_ranks(_train, 1, [case], folders, mistake, timeout_s=120)[0]
    assert "gradients" in found(case, outcome, folders)


def test_the_buffer_is_not_touched_on_a_cpu() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 2))
    weight.main_grad = torch.zeros(4, 2)  # type: ignore[attr-defined]
    assert module._main_gradient(weight) is None
    with into_the_buffer():
        assert module._main_gradient(weight) is weight.main_grad  # type: ignore[attr-defined]
        weight.main_grad = torch.zeros(4, 2, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        assert module._main_gradient(weight) is None, "sums of a lower precision stay apart"
