"""benchmarks/data_plane.py: both ways come to the same, its formula to what is sent; and each check can fail."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import data_plane
from benchmarks.data_plane import FORMER, NEW, Measured, Task, check_formula, check_kernel, check_same, measure
from benchmarks.plane import traffic
from benchmarks.plane.responses import Responses
from benchmarks.plane.traffic import Places
from megatron_fipo.rl.judged_group import JudgedGroup

DIVISOR = 512
SMALL = (
    "rollout.num_prompts_per_round=40",
    "rollout.num_prompts=8",
    "rollout.num_samples_per_prompt=4",
    "train.num_minibatches=2",
)
PLACES = {"leaders alone": Places(4, 1, 1, 2), "several ranks on a node": Places(2, 2, 2, 1)}

Step = tuple[Task, dict[str, list[Measured]]]


@pytest.fixture(scope="module", params=PLACES)
def step(request: pytest.FixtureRequest) -> Step:
    task = Task(PLACES[request.param], DIVISOR, SMALL)
    return task, {way: measure(way, task) for way in (NEW, FORMER)}


def test_both_ways_come_to_the_same(step: Step) -> None:
    _, found = step
    assert check_same(found[NEW], found[FORMER]) == 2 * 32, "each of two ranks, or of two nodes, trains on half"
    changed = [replace(one, digests=dict.fromkeys(one.digests, "another")) for one in found[FORMER]]
    with pytest.raises(AssertionError, match=r"rank 0: 16 responses differ"):
        check_same(found[NEW], changed)
    with pytest.raises(AssertionError, match=r"trains on other responses"):
        check_same(found[NEW], found[FORMER][::-1])


def test_the_formula_says_what_is_sent(step: Step) -> None:
    task, found = step
    responses = Responses(task.config, DIVISOR)
    messages, plan = traffic.of_data_plane(responses, task.config, task.places)
    check_formula(found[NEW], messages, plan)
    largest = max(one.largest_share for one in found[FORMER])
    check_kernel(found[FORMER], traffic.of_former_way(largest, task.places))
    messages[1, 0] += 1
    with pytest.raises(AssertionError):
        check_formula(found[NEW], messages, plan)
    with pytest.raises(AssertionError):
        check_kernel(found[FORMER], traffic.of_former_way(2 * largest, task.places))


def test_what_is_known_without_tokens_is_what_is_known_with_them() -> None:
    responses = Responses(Task(PLACES["leaders alone"], DIVISOR, SMALL).config, DIVISOR)
    for group in responses.judged(4):
        whole = JudgedGroup.of(responses.group(group.prompt_id), group.prompt_id % 4)
        assert (whole.rows == group.rows).all()
        assert (whole.source, whole.verifier) == (group.source, group.verifier)


def test_a_digest_is_of_all_that_is_trained_on() -> None:
    def sample() -> data_plane.Trajectory:
        return Responses(Task(PLACES["leaders alone"], DIVISOR, SMALL).config, DIVISOR).group(3).samples[1]

    changed = [sample() for _ in range(7)]
    changed[0].segments[0].token_ids[-1] += 1
    changed[1].segments[0].log_probs.view(torch.int32)[0] += 1  # type: ignore[union-attr]
    changed[2].segments[0].policy_version = 4
    changed[3].prompt_ids = changed[3].prompt_ids[1:]
    changed[4].finish_reason = "abort"
    changed[5].advantage = 1e-7
    changed[6].key = changed[6].key._replace(sample_index=2)
    digests = {data_plane._digest(one) for one in changed}
    assert len(digests | {data_plane._digest(sample())}) == 8
