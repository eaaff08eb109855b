"""A step of the whole loop is the same in every layout: what is sampled, what is measured, what is learned."""

from __future__ import annotations

import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fipo.rollout import collect
from megatron_fipo.rollout.source import StepRollouts
from megatron_fipo.rollout.synchronous import SynchronousSource
from tests.end_to_end.runs import BASE, ROOT, exported_weights, step_lines, timeless, train

LAYOUTS = {
    "alone": (1, ()),
    "cp2": (2, ("parallel.cp=2",)),
    "dp2": (2, ("parallel.cp=1",)),
    "tp2": (2, ("parallel.cp=1", "parallel.tp=2")),
    "tp2 with sequence parallelism": (2, ("parallel.cp=1", "parallel.tp=2", "parallel.sequence_parallel=true")),
    "pp2": (2, ("parallel.cp=1", "parallel.pp=2")),
}
OTHERS = [name for name in LAYOUTS if name != "alone"]

LONG_CHAINS = "data.train.chains.params={min_terms: 7, num_terms: 7}"
"""Of short chains a minibatch of this size has a few dozen tokens, and rounding in its gradient is not small."""

DEPENDS_ON_LAYOUT = "perf/suffix_sum_exchange_bytes"
ROUNDING = 5e-6
"""Of log-probs in float32, summed up over Future-KL's half-life."""
ROUNDING_OF_WEIGHTS = 2e-6
"""A fifth of the learning rate of the first step: of what an update changes at most."""


def _record_rollouts(file: Path, seed_by_rank: bool = False) -> None:
    """Write what a step trains on; on purpose let randomness depend on the rank."""
    original = SynchronousSource.batch

    def recording(self: SynchronousSource, step: int, **options: bool) -> StepRollouts:
        rollouts = original(self, step, **options)
        own = {key: sample.response_ids for key, sample in rollouts.held.samples.items()}
        torch.save(own, file.with_name(f"responses_{os.environ['RANK']}.pt"))
        if rollouts.judged is not None:
            judged = [(g.prompt_id, *g.rows["sample_index"], *g.rewards) for g in rollouts.judged.generated]
            torch.save([tuple(map(float, values)) for values in judged], file)
        return rollouts

    SynchronousSource.batch = recording  # type: ignore[method-assign]
    if seed_by_rank:
        seed = collect.sample_seed
        collect.sample_seed = lambda *key: seed(*key) + int(os.environ["RANK"])


def _run(folder: Path, layout: str, *overrides: str, seed_by_rank: bool = False) -> Path:
    world_size, sizes = LAYOUTS[layout]
    folder.mkdir(exist_ok=True)
    prepare = partial(_record_rollouts, folder / "rollouts.pt", seed_by_rank)
    train(
        folder / "run",
        "train.num_steps=1",
        "checkpoint.export_huggingface=true",
        LONG_CHAINS,
        *sizes,
        *overrides,
        world_size=world_size,
        prepare=prepare,
        expected=0,
    )
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _run(tmp_path_factory.mktemp("alone"), "alone")


def different_metrics(line: dict[str, Any], expected: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Metrics that differ by more than rounding, with both values."""
    assert line.keys() == expected.keys()
    different = {}
    for name in timeless(expected).keys() - {DEPENDS_ON_LAYOUT}:
        one, other = line[name], expected[name]
        if one != other and (None in (one, other) or not math.isclose(one, other, rel_tol=1e-5, abs_tol=ROUNDING)):
            different[name] = one, other
    return different


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _rollouts(folder: Path) -> list[Any]:
    """Rewards by prompt, and all responses."""
    rewards: list[Any] = torch.load(folder / "rollouts.pt")
    responses: dict[Any, list[int]] = {}
    for file in folder.glob("responses_*.pt"):
        responses |= {key: ids.tolist() for key, ids in torch.load(file).items()}
    assert len(responses) >= 32
    return [rewards, sorted(responses.items())]


@pytest.mark.parametrize("layout", OTHERS)
def test_a_step_is_the_same(layout: str, alone: Path, tmp_path: Path) -> None:
    folder = _run(tmp_path, layout)
    assert _rollouts(folder) == _rollouts(alone)
    (line,), (expected,) = (step_lines(run / "run") for run in (folder, alone))
    assert different_metrics(line, expected) == {}
    changes, learned = (exported_weights(run / "run") for run in (folder, alone))
    assert largest_difference(changes, learned) < ROUNDING_OF_WEIGHTS


def test_the_comparison_can_fail(alone: Path, tmp_path: Path) -> None:
    """A step that is slightly another one: rounding is told from a change of a thousandth."""
    other = _run(tmp_path, "alone", "optimizer.learning_rate=5.005e-5")
    assert _rollouts(other) == _rollouts(alone), "made before the first update"
    (line,), (expected,) = (step_lines(run / "run") for run in (other, alone))
    assert {"policy/log_prob_shift/absmax", "fipo/future_kl/absmax"} <= different_metrics(line, expected).keys()
    base = load_file(ROOT / BASE / "model.safetensors")
    learned = exported_weights(alone / "run")
    assert largest_difference(learned, {name: base[name].float() for name in learned}) > 5 * ROUNDING_OF_WEIGHTS


def test_randomness_by_rank_would_be_noticed(alone: Path, tmp_path: Path) -> None:
    folder = _run(tmp_path, "cp2", seed_by_rank=True)
    assert _rollouts(folder) != _rollouts(alone)
