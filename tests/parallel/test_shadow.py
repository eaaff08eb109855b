"""A training with shadow objectives: it learns the same bits, and a layout measures what one process does."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_fipo.config import Config, FipoConfig, ParallelSection
from megatron_fipo.metrics.reductions import scalars
from megatron_fipo.parallel import cp_suffix_sum
from tests.parallel import layouts
from tests.parallel.layouts import Breakage, Case, Outcome, layout, metric_differences
from tests.parallel.loss_cases import SHADOWS
from tests.parallel.ranks import run_ranks

PLAIN, SHADOWED, OTHER = "plain", "shadowed", "trained on another half-life"


def _objectives(own: FipoConfig) -> dict[str, FipoConfig]:
    return {PLAIN: own, SHADOWED: replace(own, shadow=SHADOWS), OTHER: replace(own, half_life_tokens=9.0)}


def _train(name: str, case: Case, folder: str, breakage: Breakage | None = None) -> Outcome:
    """Two steps of two updates under one of `_objectives`. Collective."""
    original = layouts.config_of

    def config_of(case: Case, folder: str) -> Config:
        config = original(case, folder)
        return replace(config, objective=_objectives(config.objective)[name])

    with mock.patch.object(layouts, "config_of", config_of), layout(case.parallel) as ranks:
        return layouts.train_actor(case, folder, ranks, breakage)


def _trainings(case: Case, folder: str) -> dict[str, Outcome] | None:
    outcomes = {name: _train(name, case, folder) for name in (PLAIN, SHADOWED, OTHER)}
    if case.parallel.cp > 1:
        no_carry = Breakage(
            during=lambda: mock.patch.object(
                cp_suffix_sum, "carries_into_chunks", lambda heads, *rest: torch.zeros(2 * len(heads), heads.shape[1])
            )
        )
        outcomes["no carry"] = _train(SHADOWED, case, folder, no_carry)
    return outcomes if dist.get_rank() == 0 else None


CASES = {
    1: Case("one", "llama", max_tokens=120),
    2: Case("cp2", "llama", ParallelSection(cp=2)),
    4: Case("pp2 cp2", "llama", ParallelSection(pp=2, cp=2), max_tokens=120),
}


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Outcome]]:
    folder = layouts.save_models(tmp_path_factory.mktemp("models"), 2)["llama"]
    return {size: run_ranks(_trainings, size, case, folder)[0] for size, case in CASES.items()}


@pytest.mark.parametrize("world_size", CASES)
def test_the_weights_keep_their_bits(trainings: dict[int, dict[str, Outcome]], world_size: int) -> None:
    plain, shadowed, other = (trainings[world_size][name] for name in (PLAIN, SHADOWED, OTHER))
    assert shadowed.losses == plain.losses
    assert shadowed.grad_norms == plain.grad_norms
    assert shadowed.weights.keys() == plain.weights.keys()
    for name, weight in plain.weights.items():
        assert torch.equal(shadowed.weights[name], weight), name
    assert not all(torch.equal(other.weights[name], weight) for name, weight in plain.weights.items()), (
        "what is trained on decides no bit"
    )


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_layout_measures_what_one_process_does(trainings: dict[int, dict[str, Outcome]], world_size: int) -> None:
    """Within what is allowed for the metrics of what is trained on."""
    one, several = trainings[1][SHADOWED], trainings[world_size][SHADOWED]
    assert len([name for name in one.metrics if name.startswith("shadow/")]) == 6 * len(SHADOWS)
    assert metric_differences(several, one) == {}
    spreads = {scalars(one.metrics)[f"shadow/{name}/influence_weight/std"] for name in SHADOWS}
    assert len(spreads) == len(SHADOWS)
    assert min(spreads) > 0.01
    broken = metric_differences(trainings[world_size]["no carry"], one)
    for name in SHADOWS:
        assert f"shadow/{name}/future_kl/std" in broken, f"{name}: a carry that is missing is not noticed"
