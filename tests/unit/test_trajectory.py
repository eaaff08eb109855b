"""Trajectories in segments: what follows from them, and what they are saved as."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Segment, Trajectory, outline, policy_segments
from tests.unit.rl_samples import make_sample


def told(*ids: int) -> Segment:
    return Segment(torch.tensor(ids), "environment")


def written(*ids: int, version: int | None = 3) -> Segment:
    return Segment(torch.tensor(ids), "policy", -torch.tensor(ids) / 8, version)


def conversation(**others: Any) -> Trajectory:
    """Two turns of the policy, the second by newer weights, with the answer of a tool between."""
    segments = [written(5, 6), told(7, 8, 9), written(1, version=4)]
    return Trajectory(SampleKey("sums", 2, 1), torch.tensor([11, 12]), segments, "stop", **others)


def test_a_response_is_its_segments_in_order() -> None:
    trajectory = conversation()
    assert trajectory.response_ids.tolist() == [5, 6, 7, 8, 9, 1]
    assert trajectory.rollout_log_probs.tolist() == [-0.625, -0.75, 0, 0, 0, -0.125]
    assert trajectory.policy_mask.tolist() == [True, True, False, False, False, True]
    assert trajectory.policy_versions == [(3, 0, 2), (4, 5, 6)]
    assert (trajectory.num_response_tokens, trajectory.num_policy_tokens, trajectory.num_tokens) == (6, 3, 8)
    assert (trajectory.prompt_id, trajectory.sample_index) == (2, 1)


def test_without_a_segment_there_is_an_empty_response() -> None:
    nothing = Trajectory(SampleKey("sums", 0, 0), torch.tensor([1]), [], "abort")
    assert nothing.response_ids.dtype == torch.int64
    assert nothing.rollout_log_probs.dtype == torch.float32
    assert (len(nothing.response_ids), len(nothing.rollout_log_probs), nothing.policy_versions) == (0, 0, [])


def test_what_the_environment_wrote_carries_no_loss() -> None:
    trajectory = conversation(advantage=2.0)
    batch = build_packed_batch([trajectory], [0], 4, 0)
    assert batch.input_ids.tolist() == [11, 12, 5, 6, 7, 8, 9, 1]
    assert batch.response_mask.tolist() == [False, True, True, False, False, False, True, False]
    assert batch.rollout_log_probs.tolist() == [0, -0.625, -0.75, 0, 0, 0, -0.125, 0]
    assert batch.response_token_counts.tolist() == [3]


def test_tokens_may_have_advantages_of_their_own() -> None:
    trajectory = conversation(advantage=torch.tensor([1.0, 2, 0, 0, 0, -3]))
    batch = build_packed_batch([trajectory], [0], 4, 0)
    assert batch.advantages.tolist() == [0, 1, 2, 0, 0, 0, -3, 0]


@pytest.mark.parametrize(
    ("author", "log_probs"), [("policy", None), ("policy", torch.zeros(3)), ("environment", torch.zeros(2))]
)
def test_log_probs_are_the_policys(author: Any, log_probs: Any) -> None:
    with pytest.raises(ValueError, match="log-probs"):
        Segment(torch.tensor([1, 2]), author, log_probs)


def test_spans_of_versions_cut_a_turn() -> None:
    ids, log_probs = torch.arange(5), torch.arange(5) / 4
    segments = policy_segments(ids, log_probs, [(1, 10, 12), (2, 12, 15)], start=10)
    assert outline(segments) == [("policy", 2, 1), ("policy", 3, 2)]
    assert segments[1].token_ids.tolist() == [2, 3, 4]
    assert segments[1].log_probs is not None
    assert segments[1].log_probs.tolist() == [0.5, 0.75, 1.0]
    assert outline(policy_segments(ids, log_probs)) == [("policy", 5, None)]


@pytest.mark.parametrize(
    "spans", [[(1, 0, 4)], [(1, 1, 5)], [(1, 0, 2), (2, 3, 5)], [(1, 0, 5), (2, 5, 7)], [(1, 0, 6)]]
)
def test_spans_that_do_not_cover_the_tokens_are_refused(spans: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="must cover the 5 tokens from 0 on"):
        policy_segments(torch.arange(5), torch.zeros(5), spans)


def test_a_group_is_what_it_was_after_saving() -> None:
    prompt = Prompt(2, "sums", "1+1=", (11, 12), "exact", "2")
    group = Group(prompt, [conversation(accuracy=1.0, parts={"math": 1.0}), conversation(error="time-out")], 7)
    again = Group.from_state_dict(group.state_dict())
    assert (again.prompt, again.created_at_step) == (prompt, 7)
    for one, other in zip(group.samples, again.samples, strict=True):
        assert outline(one.segments) == outline(other.segments)
        assert torch.equal(one.response_ids, other.response_ids)
        assert torch.equal(one.rollout_log_probs, other.rollout_log_probs)
        assert (one.key, one.accuracy, one.error, one.parts) == (other.key, other.accuracy, other.error, other.parts)


def test_a_checkpoint_from_before_there_were_segments_is_read() -> None:
    """As version 0.1.0 saved a group: dataclasses as dictionaries, spans of versions in place of segments."""
    sample = {
        **{"prompt_id": 2, "sample_index": 0, "prompt_ids": torch.tensor([11, 12]), "finish_reason": "stop"},
        **{"response_ids": torch.tensor([5, 6, 1]), "rollout_log_probs": torch.tensor([-1.0, -2, -3])},
        **{"policy_versions": [(3, 0, 2), (4, 2, 3)], "response_text": "x", "accuracy": 1.0, "answer": "2"},
        **{"reward": 1.0, "advantage": 0.5, "error": "", "parts": {}},
    }
    prompt = {
        "prompt_id": 2,
        "source": "sums",
        "text": "",
        "token_ids": (11, 12),
        "verifier": "exact",
        "reference": "2",
    }
    group = Group.from_state_dict({"prompt": prompt, "samples": [sample], "created_at_step": 1})
    (trajectory,) = group.samples
    assert trajectory.key == ("sums", 2, 0)
    assert outline(trajectory.segments) == [("policy", 2, 3), ("policy", 1, 4)]
    assert trajectory.rollout_log_probs.tolist() == [-1, -2, -3]
    assert (trajectory.response_text, trajectory.advantage) == ("x", 0.5)


def test_recorded_segments_must_fit_the_tokens() -> None:
    state = make_sample().state_dict()
    state["segments"] = [("policy", 3, 1)]
    with pytest.raises(ValueError, match="segments of 3 tokens in all were recorded with a response of 4 tokens"):
        Trajectory.from_state_dict(state, "sums")
