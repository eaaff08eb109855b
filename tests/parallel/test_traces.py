"""A trace tells the same of each token under every layout as in one process, and what the objective's formulas say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import Config, FipoConfig, MetricsSection, ParallelSection
from megatron_fipo.parallel import traced_tokens
from megatron_fipo.parallel.batch import build_own_minibatches, divide
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.parallel.traced_tokens import TracedTokens
from megatron_fipo.rl.judged_group import JudgedGroup, plan_of
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.source import JudgedStep, StepRollouts
from megatron_fipo.run.tracing import Tracing
from megatron_fipo.traces.files import read_trace, trace_files
from megatron_fipo.traces.schema import FLOAT_COLUMNS, SEQUENCE_FILTER, TracedResponse, columns
from tests.parallel.layouts import INFLUENCE_BOUND, PAD_TOKEN, Case, config_of, groups_of_step, layout, save_models
from tests.parallel.ranks import RankError, run_ranks

P = ParallelSection
LAYOUTS = {
    "tp2_cp2_pp2": P(tp=2, sequence_parallel=True, cp=2, pp=2),
    "cp2_dp4": P(cp=2),
    "pp2_vpp2_dp4": P(pp=2, virtual_pp=2),
}
"""On eight ranks."""
AFTER_AN_UPDATE = 5
"""Values of the second update follow the first one's rounding, which Adam enlarges: their bound is so much wider."""


def _rollouts(ranks: ParallelGroups) -> StepRollouts:
    """A step whose responses rank 0 holds."""
    groups = groups_of_step(0)
    judged = [JudgedGroup.of(group) for group in groups]
    for group, of_group in zip(groups, judged, strict=True):
        of_group.advantages = np.array([sample.advantage for sample in group.samples])
        of_group.rewards = np.sign(of_group.advantages)
    held = Held.of(groups) if ranks.rank == 0 else Held()
    return StepRollouts(plan_of(judged), [4] * 4, held, JudgedStep(judged, judged) if ranks.rank == 0 else None)


def _trace(
    folder: Path, model: str, parallel: ParallelSection, section: MetricsSection, broken: Callable[[], None] | None
) -> None:
    """A step's updates as the trainer makes and traces them."""
    if broken is not None:
        broken()
    config: Config = replace(config_of(Case("traced", parallel=parallel), model), metrics=section)
    with layout(parallel) as ranks:
        actor = Actor(config, ranks)
        rollouts = _rollouts(ranks)
        division = divide(rollouts.plan["num_tokens"].tolist(), rollouts.group_sizes, config, ranks.dp.size())
        samples = dict(enumerate(sample for group in groups_of_step(0) for sample in group.samples))
        minibatches = build_own_minibatches(division, samples, config, ranks, PAD_TOKEN, version=0)
        for microbatches in minibatches:
            for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=ranks.is_last_stage):
                batch.old_log_probs = log_probs - batch.rollout_log_probs
        plane = DataPlane(ranks, ranks.rank == 0)
        tracing = Tracing(config, ranks, plane, str, lambda ids: [f"{one} " for one in ids], folder)
        trace = tracing.begin(0, rollouts, division)
        assert trace is not None
        for update, microbatches in enumerate(minibatches):
            actor.update(microbatches, trace.watching(Objective(config.objective, ranks.cp), update), 0)
            trace.write(update, len(minibatches))


def _traces(folder: Path) -> list[TracedResponse]:
    return [response for path in trace_files(folder).values() for response in read_trace(path).responses]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"))["qwen2"]


ALL = MetricsSection(num_traced_groups=4, trace_every_num_steps=1)


@pytest.fixture(scope="module")
def alone(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trace of all responses in one process."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(_trace, 1, folder, model, P(), ALL, None, timeout_s=120)
    return folder


def _trace_all(folder: Path, model: str) -> None:
    for name, parallel in LAYOUTS.items():
        _trace(folder / name, model, parallel, ALL, None)


@pytest.fixture(scope="module")
def sharded(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    run_ranks(_trace_all, 8, folder, model, timeout_s=300)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sharded_trace_is_that_of_one_process(name: str, sharded: Path, alone: Path) -> None:
    ours, theirs = _traces(sharded / name), _traces(alone)
    assert len(ours) == len(theirs) == 16
    for one, other in zip(ours, theirs, strict=True):
        bound = INFLUENCE_BOUND * (1 if one.update == 0 else AFTER_AN_UPDATE)
        for column, _, _ in columns():
            left, right = getattr(one, column), getattr(other, column)
            if column in FLOAT_COLUMNS:
                np.testing.assert_allclose(left, right, rtol=bound, atol=bound, err_msg=column)
            else:
                assert np.array_equal(left, right), column


def _recurrence(terms: NDArray[np.float64], half_life: float) -> NDArray[np.float64]:
    sums, total = np.empty(len(terms)), 0.0
    for place in reversed(range(len(terms))):
        total = terms[place] + 2.0 ** (-1 / half_life) * total
        sums[place] = total
    return sums


def test_a_trace_is_what_the_formulas_say(alone: Path) -> None:
    samples = [sample for group in groups_of_step(0) for sample in group.samples]
    path, *_ = trace_files(alone).values()
    objective = FipoConfig(**read_trace(path).objective)
    assert objective.half_life_tokens == 8.0
    responses = _traces(alone)
    assert [(one.prompt_id, one.sample_index) for one in responses] == [(s.prompt_id, s.sample_index) for s in samples]
    for one, sample in zip(responses, samples, strict=True):
        assert one.token_ids.tolist() == sample.response_ids.tolist()
        assert "".join(one.texts) == "".join(f"{token} " for token in sample.response_ids.tolist())
        drift = sample.rollout_log_probs.numpy().astype(np.float64)
        if one.update == 0:  # no update has changed the weights, and the old log-probs were moved by the drift
            np.testing.assert_allclose(one.log_prob_shifts, drift, atol=1e-5)
        shift = one.log_prob_shifts.astype(np.float64)
        np.testing.assert_allclose(one.log_probs - one.old_log_probs, shift, atol=1e-5)
        ratio = np.exp(shift)
        assert np.array_equal(one.participates, ratio <= 10)
        future_kl = _recurrence(np.where(one.participates, shift, 0.0), 8.0)
        np.testing.assert_allclose(one.future_kl, future_kl, atol=1e-5)
        weights = np.clip(np.exp(future_kl), 0.8, 1.2)
        if one.advantage < 0:
            weights = np.where(ratio > 3, np.clip(weights, 0.8, 1.0), weights)
        np.testing.assert_allclose(one.influence_weights, weights, atol=1e-5)
        weighted = weights * one.advantage
        loss = np.maximum(-weighted * ratio, -weighted * np.clip(ratio, 0.8, 1.28))
        loss = np.where(weighted < 0, np.minimum(loss, -weighted * 10), loss)
        np.testing.assert_allclose(one.token_losses, loss, atol=1e-4)
        is_filtered = one.advantage < 0 and int((ratio > 10).sum()) > 1
        assert one.left_out == (SEQUENCE_FILTER if is_filtered else "")
        assert set(one.left_out_tokens) == {one.left_out}
        assert np.all(one.entropies > 0)
        assert np.all(one.entropies <= math.log(20))
    assert sum(one.left_out == SEQUENCE_FILTER for one in responses) == 2
    assert any(not one.participates.all() for one in responses)


def test_chosen_groups_alone_are_gathered(model: str, tmp_path: Path) -> None:
    """Of the later minibatch before the first one's, whose shifts are noise."""
    section = MetricsSection(num_traced_groups=1, trace_every_num_steps=1)
    run_ranks(_trace, 2, tmp_path, model, P(cp=2), section, None, timeout_s=120)
    assert list(trace_files(tmp_path)) == [(0, 1)]
    assert {response.prompt_id for response in _traces(tmp_path)} in ({2}, {3})


# --- mistakes on purpose ---------------------------------------------------------------------------------------------


def _unordered() -> None:
    """Rows stay in the order in which ranks hold them: zigzag."""

    def joined(parts: list[TracedTokens]) -> TracedTokens:
        values = ([getattr(part, name) for part in parts] for name in TracedTokens.__dataclass_fields__)
        return TracedTokens(*(np.concatenate(arrays) for arrays in values))

    traced_tokens.joined = joined


def _one_rank_too_few() -> None:
    """Rows of one context-parallel rank are missing."""
    right = traced_tokens.joined
    traced_tokens.joined = lambda parts: right(parts[:1])


@pytest.mark.parametrize("broken", [_unordered, _one_rank_too_few])
def test_rows_in_a_wrong_order_or_missing_are_noticed(broken: Callable[[], None], model: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="AssertionError"):
        run_ranks(_trace, 2, tmp_path, model, P(cp=2), ALL, broken, timeout_s=120)
