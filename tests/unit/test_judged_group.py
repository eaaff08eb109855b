"""What rank 0 sees of responses: how much it is, that it survives the way, and the plan that it makes of it."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from megatron_fipo.rl.judged_group import (
    NO_VERSION,
    PLANNED,
    RESPONSE,
    JudgedGroup,
    from_bytes,
    from_wire,
    plan_of,
    to_bytes,
    to_wire,
)
from megatron_fipo.rl.trajectory import Segment
from tests.unit.rl_samples import make_group, make_judged


def test_a_response_is_32_bytes_and_a_planned_one_16() -> None:
    assert RESPONSE.itemsize == 32
    assert PLANNED.itemsize == 16


def test_what_is_known_of_a_response() -> None:
    group = make_group(5, (1.0, 0.25), step=3, error="no verdict", lengths=(2, 4))
    group.samples[1].finish_reason = "length"
    group.samples[1].parts = {"math": 0.25}
    group.samples[1].segments = [
        Segment(torch.tensor([1, 2]), "policy", torch.zeros(2), 8),
        Segment(torch.tensor([1, 2]), "policy", torch.zeros(2), 7),
    ]
    judged = JudgedGroup.of(group, leader=130)
    assert (judged.prompt_id, judged.source, judged.verifier, judged.created_at_step) == (5, "arithmetic", "exact", 3)
    assert judged.rows["score"].tolist() == [1.0, 0.25]
    assert judged.rows["num_tokens"].tolist() == [2, 4]
    assert judged.rows["num_prompt_tokens"].tolist() == [3, 3]
    assert judged.rows["oldest_version"].tolist() == [NO_VERSION, 7]
    assert judged.rows["leader"].tolist() == [130, 130]
    assert judged.rows["is_truncated"].tolist() == [False, True]
    assert judged.judged.tolist() == [False, True]
    assert (judged.errors, judged.parts) == ({0: "no verdict"}, {1: {"math": 0.25}})


def test_a_score_a_little_below_1_is_not_right() -> None:
    """As it would be in float32."""
    almost = 1.0 - 1e-9
    assert make_judged(0, (1.0, almost)).is_right.tolist() == [True, False]
    assert np.float32(almost) == 1.0


def test_groups_of_several_ranks_come_in_the_order_of_the_prompts() -> None:
    first = [make_judged(0, (1.0, 0.0)), make_judged(4, (0.0,) * 3, error="died")]
    second = [make_judged(3, (1.0, 1.0))]
    received = from_wire(pickle.loads(pickle.dumps([to_wire(first), to_wire([]), to_wire(second)])))
    assert [group.prompt_id for group in received] == [0, 3, 4]
    for group, expected in zip(received, [first[0], second[0], first[1]], strict=True):
        assert np.array_equal(group.rows, expected.rows)
        assert (group.source, group.verifier, group.errors) == (expected.source, expected.verifier, expected.errors)
    assert from_wire([to_wire([]), to_wire([])]) == []


def test_a_ranks_word_is_little_more_than_32_bytes_a_response() -> None:
    groups = [make_judged(index, (1.0,) * 16) for index in range(128)]
    assert len(pickle.dumps(to_wire(groups))) < 128 * 16 * 32 + 128 * 40 + 1000
    per_sample = len(pickle.dumps([make_group(index, (1.0,) * 16) for index in range(128)])) / (128 * 16)
    assert per_sample > 1000, "of responses of four tokens, in the form that is not sent"


def test_the_plan_has_the_batch_in_order() -> None:
    groups = [make_judged(7, (1.0, 0.0), lengths=(5, 6)), make_judged(9, (0.0, 1.0))]
    groups[1].rows["leader"] = 3
    groups[0].advantages, groups[1].advantages = np.array([0.1, -0.1]), np.array([-2.0, 2.0])
    plan = plan_of(groups)
    assert plan["prompt_id"].tolist() == [7, 7, 9, 9]
    assert plan["sample_index"].tolist() == [0, 1, 0, 1]
    assert plan["leader"].tolist() == [0, 0, 3, 3]
    assert plan["num_tokens"].tolist() == [8, 9, 7, 7]
    assert plan["advantage"].tolist() == torch.tensor([0.1, -0.1, -2.0, 2.0]).tolist()


def test_a_prompt_beyond_the_field_is_refused() -> None:
    with pytest.raises(OverflowError):
        make_judged(2**32, (1.0, 0.0))


def test_what_rank_0_reads_from_the_store_is_data_and_not_code() -> None:
    group = make_group(0, (0.5, 1.0), error='no "verdict"\n½')
    group.samples[1].parts = {"math": 1 / 3}
    sent = JudgedGroup.of(group, 7)
    (received,) = from_bytes([to_bytes([sent])])
    assert np.array_equal(received.rows, sent.rows)
    assert (received.errors, received.parts) == (sent.errors, sent.parts)
    assert (received.source, received.verifier, received.created_at_step) == ("arithmetic", "exact", 0)
    with pytest.raises(ValueError, match="can't decode"):
        from_bytes([pickle.dumps([sent])])
