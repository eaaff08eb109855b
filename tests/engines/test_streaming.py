"""Runs that stream their rollouts from real servers, interrupted and killed in the middle of a stream.

SGLang's run has two nodes with a server each, which share a step's responses out as they have room; vLLM's has one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.parallel.local_ranks import RankError
from megatron_fipo.system.exit_codes import EXIT_STOPPED
from tests.end_to_end import kills
from tests.end_to_end.runs import step_lines
from tests.engines import streamed

NUM_STEPS = 3
NUM_SERVERS = {"sglang": 2, "vllm": 1}


@dataclass
class Run:
    """A run of three steps that was asked to leave in step 1, killed there when it went on, and then finished."""

    engine: str
    folder: Path
    at_signal: list[dict[str, Any]]
    """What was recorded of step 1 when the run had left."""
    load_at_signal: int
    """Requests that servers still had then."""
    at_kill: list[dict[str, Any]]
    """What was recorded of it when the run had been killed."""

    @property
    def num_leaders(self) -> int:
        return NUM_SERVERS[self.engine]


@pytest.fixture(
    scope="module",
    params=[pytest.param("sglang", marks=pytest.mark.sglang), pytest.param("vllm", marks=pytest.mark.vllm)],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    engine: str = request.param
    folder = tmp_path_factory.mktemp(engine) / "run"
    victim = NUM_SERVERS[engine] - 1  # where it can be, not the rank that keeps the books
    with streamed.running_servers(engine, folder.parent / "logs", NUM_SERVERS[engine]) as urls:
        signalled = partial(streamed.on_rank, victim, partial(kills.signalled_in_stream, step=1, num_samples=3))
        streamed.stream(folder, engine, urls, "signalled", prepare=signalled, expected=EXIT_STOPPED)
        at_signal, load = streamed.records(folder, 1), sum(streamed.num_requests(engine, url) for url in urls)
        killed = partial(streamed.on_rank, victim, partial(kills.in_stream, step=1, num_samples=3))
        with pytest.raises(RankError):
            streamed.stream(folder, engine, urls, "killed", prepare=killed)
        at_kill = streamed.records(folder, 1)
        _wait_until_idle(engine, urls)
        streamed.stream(folder, engine, urls, "finished", prepare=streamed.nothing, expected=0)
    return Run(engine, folder, at_signal, load, at_kill)


def _wait_until_idle(engine: str, urls: list[str]) -> None:
    """Servers end what nobody waits for any more."""
    deadline = time.monotonic() + streamed.PATIENCE_S
    while any(streamed.num_requests(engine, url) for url in urls):
        assert time.monotonic() < deadline, "a killed run's requests stay on the server"
        time.sleep(0.1)


def test_log_probs_are_the_actors_in_every_step(run: Run) -> None:
    lines = step_lines(run.folder)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    for line in lines:
        assert line["mismatch/log_prob_difference/absmax"] < 1e-4
        assert line["canary/log_prob_difference/max"] < 1e-4
        assert line["rollout/requests_resent"] == 0
        assert line["fipo/influence_weight/std"] > 0


def test_what_is_in_flight_at_the_end_of_a_step_is_freed_before_the_next_weights(run: Run) -> None:
    seen = streamed.seen_by(run.folder)
    ends = [one for one in seen if one["at"] == "end"]
    assert {one["step"] for one in ends} == set(range(NUM_STEPS))
    assert any(one["aborted"] for one in ends if (one["launch"], one["step"]) == ("signalled", 1))
    if run.engine == "vllm":  # see MOST_REQUESTS
        assert any(one["aborted"] for one in ends if (one["launch"], one["step"]) != ("signalled", 1))
    assert [one for one in ends if one["load"]] == [], "it is still on the server"
    assert [one for one in seen if one["at"] == "update" and one["load"]] == []
    assert run.load_at_signal == 0


def test_every_response_of_a_step_has_its_version(run: Run) -> None:
    for step in range(NUM_STEPS):
        segments = [one["segments"] for one in streamed.records(run.folder, step)]
        assert {version for parts in segments for _, _, version in parts} == {step}


def test_batches_are_the_first_groups_with_a_signal(run: Run) -> None:
    first = 0
    for step in range(NUM_STEPS):
        expected = streamed.first_with_a_signal(streamed.records(run.folder, step), first)
        assert streamed.plan(run.folder, step) == expected
        first = expected[1]


def test_what_was_recorded_is_used_and_nothing_is_generated_twice(run: Run) -> None:
    assert len(run.at_signal) >= 3
    for step in range(NUM_STEPS):
        keys = [(one["prompt_id"], one["sample_index"]) for one in streamed.records(run.folder, step)]
        assert len(keys) == len(set(keys))
    for before, after in ((run.at_signal, run.at_kill), (run.at_kill, streamed.records(run.folder, 1))):
        assert len(after) > len(before)
        assert all(one in after for one in before)


def test_nodes_share_the_responses(run: Run) -> None:
    for step in range(NUM_STEPS):
        ranks = [one["rank"] for one in streamed.records(run.folder, step)]
        assert set(ranks) == set(range(run.num_leaders))
