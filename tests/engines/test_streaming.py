"""Runs that stream their rollouts from real servers, interrupted and killed in the middle of a stream.

SGLang's run has two nodes with a server each, which share a step's responses out as they have room; vLLM's has one.
"""

from __future__ import annotations

import pytest

from tests.end_to_end.runs import step_lines
from tests.engines import streamed
from tests.engines.accounts import first_with_a_signal, place_of, plan, records
from tests.engines.streamed import Interrupted

NUM_STEPS = 3


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("sglang", marks=pytest.mark.sglang),
        pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.long]),
    ],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    """A run of three steps, interrupted twice in one of them."""
    folder = tmp_path_factory.mktemp(request.param) / "run"
    with streamed.running_servers(request.param, folder.parent / "logs") as urls:
        return streamed.interrupted(request.param, folder, urls, signalled_in=1, killed_in=1)


def test_log_probs_are_the_actors_in_every_step(run: Interrupted) -> None:
    lines = step_lines(run.folder)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    for line in lines:
        assert line["mismatch/log_prob_difference/absmax"] < 1e-4
        assert line["canary/log_prob_difference/max"] < 1e-4
        assert line["rollout/requests_resent"] == 0
        assert line["fipo/influence_weight/std"] > 0


def test_what_is_in_flight_at_the_end_of_a_step_is_freed_before_the_next_weights(run: Interrupted) -> None:
    seen = streamed.seen_by(run.folder)
    ends = [one for one in seen if one["at"] == "end"]
    assert {one["step"] for one in ends} == set(range(NUM_STEPS))
    # At SGLang all that a step begins is in flight at once, at vLLM few are, so that others are at the end of a batch.
    # Which end finds the last of them written is up to the machine.
    cut_short = [(one["launch"], one["step"]) for one in ends if one["aborted"]]
    assert ("signalled", run.signalled_in) in cut_short if run.engine == "sglang" else cut_short
    assert [one for one in ends if one["load"]] == [], "it is still on the server"
    assert [one for one in seen if one["at"] == "update" and one["load"]] == []
    assert run.load_at_signal == 0


def test_every_response_of_a_step_has_its_version(run: Interrupted) -> None:
    for step in range(NUM_STEPS):
        segments = [one["segments"] for one in records(run.folder, step)]
        assert {version for parts in segments for _, _, version in parts} == {step}


def test_batches_are_the_first_groups_with_a_signal(run: Interrupted) -> None:
    first = 0
    for step in range(NUM_STEPS):
        expected = first_with_a_signal(records(run.folder, step), first)
        assert plan(run.folder, step) == expected
        first = expected[1]


def test_what_was_recorded_is_used_and_nothing_is_generated_twice(run: Interrupted) -> None:
    assert len(run.at_signal) >= 3
    for step in range(NUM_STEPS):
        keys = [place_of(one) for one in records(run.folder, step)]
        assert len(keys) == len(set(keys))
    assert run.killed_in >= run.signalled_in >= 1
    for step, before in ((run.signalled_in, run.at_signal), (run.killed_in, run.at_kill)):
        after = records(run.folder, step)
        assert len(after) > len(before)
        assert all(one in after for one in before)


def test_nodes_share_the_responses(run: Interrupted) -> None:
    for step in range(NUM_STEPS):
        ranks = [one["rank"] for one in records(run.folder, step)]
        assert set(ranks) == set(range(streamed.NUM_SERVERS[run.engine]))
