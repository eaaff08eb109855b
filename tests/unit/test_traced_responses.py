"""What is noted of a response's tokens, and what a trace tells of it, without a model or other ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fipo.config import Config, FipoConfig, MetricsSection, TrainSection
from megatron_fipo.parallel.batch import Division
from megatron_fipo.parallel.traced_tokens import TokenTracer
from megatron_fipo.rl.judged_group import JudgedGroup, plan_of
from megatron_fipo.rl.objective import policy_loss
from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.sequences import WholeSequences
from megatron_fipo.rl.token_values import TokenValues
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Segment, Trajectory
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.source import JudgedStep, StepRollouts
from megatron_fipo.run.tracing import Chosen, StepTrace, Told, Tracing
from tests.unit.test_traces import judged, tokens_of


def test_a_response_of_several_segments_is_told_whole() -> None:
    """Two versions of the weights, with an environment between; the group was left over from an earlier step."""
    one = Trajectory(
        SampleKey("sums", 7, 2),
        torch.tensor([1, 1, 1]),
        [
            Segment(torch.tensor([11, 12]), "policy", torch.tensor([-0.5, -0.25]), 3),
            Segment(torch.tensor([13]), "environment"),
            Segment(torch.tensor([14]), "policy", torch.tensor([-0.125]), 4),
            Segment(torch.tensor([15]), "policy", torch.tensor([-1.0])),
        ],
        "stop",
        accuracy=0.25,
        answer="4",
    )
    group = JudgedGroup.of(Group(Prompt(7, "sums", "", (1,), "exact", ""), [one], 5), leader=3)
    group.rewards, group.advantages = np.array([-0.75]), np.array([1.5])
    rollouts = StepRollouts(plan_of([group]), [1], Held(), JudgedStep([group], [group]))
    tracing: Any = SimpleNamespace(config=Config())
    (chosen,) = Tracing._choice(tracing, 6, rollouts) or []
    assert (chosen.index, chosen.leader, chosen.first, chosen.num_tokens) == (0, 3, 2, 5)
    told = Told("sums", "the prompt", "the reference", 5, ["a", "b", "c", "d", "e"], one)
    trace = StepTrace(tracing, 6, [chosen], {0: told}, Division([[[([0], 8)]]]))
    tokens = tokens_of("yynyy", "yynyy")
    tokens.positions += 2
    found = trace._response(0, tokens, 1, 4)
    assert (found.step, found.update, found.num_updates, found.created_at_step) == (6, 1, 4, 5)
    assert (found.reward, found.advantage, found.score, found.answer) == (-0.75, 1.5, 0.25, "4")
    assert (found.prompt_id, found.sample_index, found.prompt, found.reference) == (7, 2, "the prompt", "the reference")
    assert found.token_ids.tolist() == [11, 12, 13, 14, 15]
    assert found.segments.tolist() == [0, 0, 1, 2, 3]
    assert found.policy_versions.tolist() == [3, 3, -1, 4, -1]
    assert found.rollout_log_probs.tolist() == [-0.5, -0.25, 0.0, -0.125, -1.0]
    assert found.left_out_tokens == ["", "", "environment", "", ""]


@pytest.mark.parametrize(("every", "expected"), [(4, [0, 4, 8, 9]), (0, []), (100, [0, 9])])
def test_which_steps_are_traced(every: int, expected: list[int]) -> None:
    config = replace(Config(), metrics=MetricsSection(trace_every_num_steps=every), train=TrainSection(num_steps=10))
    tracing: Any = SimpleNamespace(config=config)
    assert [step for step in range(10) if Tracing.is_due(tracing, step)] == expected


@pytest.mark.parametrize(("epochs", "expected"), [(1, {1, 2}), (2, {0, 1, 2})])
def test_where_an_epoch_follows_the_first_minibatch_is_as_good_as_any(epochs: int, expected: set[int]) -> None:
    groups = [judged(place, "rw") for place in range(3)]
    for group in groups:
        group.rewards = group.advantages = np.zeros(2)
    rollouts = StepRollouts(plan_of(groups), [2] * 3, Held(), JudgedStep(groups, groups))
    train = TrainSection(num_minibatches=3, num_epochs=epochs)
    tracing: Any = SimpleNamespace(config=replace(Config(), train=train, metrics=MetricsSection(num_traced_groups=1)))
    chosen = [Tracing._choice(tracing, step, rollouts) or [] for step in range(30)]
    assert {one.prompt_id for of_step in chosen for one in of_step} == expected
    assert all([one.index for one in of_step] == [2 * of_step[0].prompt_id + k for k in (0, 1)] for of_step in chosen)


def test_each_epoch_sees_the_minibatches_again() -> None:
    trajectories: dict[int, Told] = {}
    chosen = [Chosen(index, 0, index, 0, 0, 1, 0.0, 0.0) for index in (1, 2)]
    division = Division([[[([0], 8)], [([1], 8)]], [[([], 8)], [([2], 8), ([3], 8)]]])
    trace = StepTrace(SimpleNamespace(), 0, chosen, trajectories, division)  # type: ignore[arg-type]
    assert [trace._indices_of(update) for update in range(4)] == [{1: 1}, {2: 1}, {1: 1}, {2: 1}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_noted_as_the_loss_saw_them(dtype: torch.dtype) -> None:
    """With a correction, without Future-KL, and of one of two sequences."""
    samples = [
        Trajectory.of_response(
            0, index, torch.ones(2 + index).long(), torch.ones(3).long(), torch.full((3,), -1.0), "stop"
        )
        for index in range(2)
    ]
    batch = build_packed_batch(samples, [0, 1], 8, 0)
    log_probs = torch.linspace(-2, -0.5, 16, dtype=dtype)
    tokens = TokenValues(
        *(log_probs, log_probs - 0.25, torch.ones(16), batch.response_mask),
        entropy=torch.linspace(0, 1.5, 16, dtype=dtype),
        rollout_log_probs=batch.rollout_log_probs,
    )
    config = FipoConfig(future_kl=False, rollout_correction="token_truncated")
    loss = policy_loss(tokens, WholeSequences(batch.layout.cu_seqlens_padded), config)
    tracer = TokenTracer({1: (2, 3)}, config, notes=True)
    tracer(batch, tokens, loss)
    assert list(tracer.noted) == [1]
    found, rows = tracer.noted[1], slice(8 + 2, 8 + 5)
    assert found.positions.tolist() == [2, 3, 4]
    assert loss.correction_weights is not None
    assert len(set(loss.correction_weights[rows].tolist())) > 1
    for name, values in {
        "log_probs": tokens.log_probs,
        "old_log_probs": tokens.old_log_probs,
        "entropies": tokens.entropy,
        "correction_weights": loss.correction_weights,
        "token_losses": loss.token_loss,
    }.items():
        assert values is not None
        assert getattr(found, name).tolist() == values[rows].float().tolist(), name
    assert np.isnan(found.future_kl).all()
    assert found.influence_weights.tolist() == [1.0] * 3
    assert not found.participates.any(), "no shift enters a sum that there is not"
    silent = TokenTracer({1: (2, 3)}, config, notes=False)
    silent(batch, tokens, loss)
    assert silent.noted == {}
