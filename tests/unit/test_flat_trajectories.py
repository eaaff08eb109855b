"""Trajectories as flat arrays: nothing is lost on the way, and nothing travels that is not needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron_fipo.rl.flat_trajectories import flatten, unflatten
from megatron_fipo.rl.trajectory import SampleKey, Segment, Trajectory
from tests.unit.rl_samples import make_sample


def conversation() -> Trajectory:
    """Two versions of the policy, an environment between them, and log-probs of all kinds of bits."""
    segments = [
        Segment(torch.tensor([5, 6]), "policy", torch.tensor([-0.0, -1e-30]), 3),
        Segment(torch.tensor([7]), "environment"),
        Segment(torch.tensor([151_642, 8]), "policy", torch.tensor([float("-inf"), -17.0]), None),
    ]
    return Trajectory(SampleKey("sums", 2**32 - 2, 15), torch.tensor([1, 2, 3]), segments, "length")


def empty() -> Trajectory:
    return Trajectory(SampleKey("sums", 1, 0), torch.tensor([9]), [], "abort")


def assert_same(one: Trajectory, other: Trajectory) -> None:
    assert (one.prompt_id, one.sample_index, one.finish_reason) == (
        other.prompt_id,
        other.sample_index,
        other.finish_reason,
    )
    assert torch.equal(one.prompt_ids, other.prompt_ids)
    assert len(one.segments) == len(other.segments)
    for segment, expected in zip(one.segments, other.segments, strict=True):
        assert (segment.author, segment.policy_version) == (expected.author, expected.policy_version)
        assert segment.token_ids.dtype == torch.int64
        assert torch.equal(segment.token_ids, expected.token_ids)
        if expected.log_probs is None:
            assert segment.log_probs is None
        else:
            assert segment.log_probs is not None
            assert segment.log_probs.view(torch.int32).tolist() == expected.log_probs.view(torch.int32).tolist()


def assert_only(flat: NDArray[np.int32], expected: Trajectory) -> None:
    ((index, one),) = unflatten(flat)
    assert index == 0
    assert_same(one, expected)


def test_all_that_training_needs_comes_back_bit_for_bit() -> None:
    sent = [(7, conversation()), (0, make_sample(5, prompt_id=4, sample_index=2)), (3, empty())]
    joined = np.concatenate([flatten(sent[:2]), flatten([]), flatten(sent[2:])])
    received = list(unflatten(joined))
    assert [index for index, _ in received] == [7, 0, 3]
    for (_, one), (_, expected) in zip(received, sent, strict=True):
        assert_same(one, expected)


def test_a_change_on_the_way_would_be_seen() -> None:
    flat = flatten([(0, conversation())])
    unread = {11, len(flat) - 3}  # where the environment's segment would have its version, and its token its log-prob
    for place in {*range(len(flat))} - unread:
        changed = flat.copy()
        changed[place] ^= 1
        with pytest.raises((AssertionError, ValueError, IndexError, RuntimeError)):
            assert_only(changed, conversation())


def test_what_is_not_wanted_is_passed_over() -> None:
    flat = flatten([(index, make_sample(index + 1, prompt_id=index)) for index in range(6)])
    assert [(index, one.prompt_id) for index, one in unflatten(flat, {4, 1})] == [(1, 1), (4, 4)]
    assert list(unflatten(flat, ())) == []


def test_eight_bytes_a_response_token_and_four_a_prompt_token() -> None:
    sample = make_sample(1000, num_prompt_tokens=100)
    assert flatten([(0, sample)]).nbytes == 4 * (6 + 3) + 4 * 100 + 8 * 1000
