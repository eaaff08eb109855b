"""Runs that train on one step while real servers write for the next one, and take new weights meanwhile.

SGLang's run has two nodes with a server each, vLLM's has one. It is killed between two updates. When it goes on, two
more servers join it, which `megatron-fipo serve` has started, and leave it, the one asked to and the other one killed.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.parallel.local_ranks import RankError
from tests.end_to_end import kills
from tests.end_to_end.runs import step_lines
from tests.engines import joining, streamed
from tests.engines.accounts import BOUND, NUM_SAMPLES, Account, account_for, records

NUM_STEPS = 8
OVERLAPS = (
    f"train.num_steps={NUM_STEPS}",
    f"rollout.max_staleness_steps={BOUND}",
    "rollout.overlap=true",
    "servers.max_concurrent_requests=16",
    "servers.health_timeout_s=5",
    "evaluation.every_num_steps=0",
    "optimizer.learning_rate=1e-4",
)
KILLED_IN, JOINED_IN = 3, 5
TOLERANCE = 1e-4


@dataclass
class Run:
    """A run that was killed between the updates of a step, while the next one was being generated, and finished."""

    engine: str
    folder: Path
    account: Account
    asked: list[dict[str, Any]]
    """What the servers that joined were asked, in order."""
    said: list[str]
    """What each of the two commands has said that had started them."""
    status: list[int]
    """The exit statuses of those."""

    def name_of(self, number: int) -> str:
        """The server that one of the two commands has started."""
        (name,) = {one["server"] for one in self.asked if one["server"] in self.said[number]}
        return str(name)


@pytest.fixture(
    scope="module",
    params=[pytest.param("sglang", marks=pytest.mark.sglang), pytest.param("vllm", marks=pytest.mark.vllm)],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    engine: str = request.param
    parent = tmp_path_factory.mktemp(engine)
    folder, logs = parent / "run", [parent / "first.log", parent / "second.log"]
    with streamed.running_servers(engine, parent / "logs") as urls:
        victim = partial(streamed.on_rank, len(urls) - 1, partial(kills.in_update, step=KILLED_IN, num_done=1))
        with pytest.raises(RankError):
            streamed.stream(folder, engine, urls, "killed", *OVERLAPS, prepare=victim)
        streamed.wait_until_idle(engine, urls)
        with joining.serving(engine, folder, logs[0]) as first, joining.serving(engine, folder, logs[1]) as second:
            pids = [first.pid, second.pid]
            prepare = partial(joining.join, engine, JOINED_IN, folder, parent / "asked", logs, pids)
            streamed.stream(folder, engine, urls, "finished", *OVERLAPS, prepare=prepare, expected=0)
            status = [process.wait(streamed.PATIENCE_S) for process in (first, second)]
        assert sum(streamed.num_requests(engine, url) for url in urls) == 0, "all that was begun has ended"
    asked = [json.loads(line) for line in (parent / "asked").read_text().splitlines()]
    return Run(engine, folder, account_for(folder, NUM_STEPS), asked, [log.read_text() for log in logs], status)


def test_weights_come_while_responses_are_written(run: Run) -> None:
    updates = [one for one in streamed.seen_by(run.folder) if one["at"] == "update" and one["version"] > 0]
    assert any(one["load"] for one in updates)


def test_responses_are_written_by_the_weights_before_and_after(run: Run) -> None:
    of_versions = {
        tuple(version for _, _, version in one["segments"])
        for step in range(1, NUM_STEPS)
        for one in records(run.folder, step)
    }
    assert any(len({*versions}) == 2 for versions in of_versions)


def test_what_new_weights_write_has_the_actors_log_probs(run: Run) -> None:
    """After what older ones wrote, in requests that were in flight when they came."""
    found = [line["mismatch/newest_version/log_prob_difference/absmax"] for line in step_lines(run.folder)]
    assert max(value for value in found if value is not None) < TOLERANCE
    older = [line["mismatch/older_versions/log_prob_difference/absmax"] for line in step_lines(run.folder)]
    assert max(value for value in older if value is not None) > TOLERANCE, "weights change"


def test_no_token_is_staler_than_the_bound(run: Run) -> None:
    stalest = [line["rollout/staleness_steps/max"] for line in step_lines(run.folder)]
    assert len(stalest) == NUM_STEPS
    assert stalest[0] == 0
    assert max(stalest) == BOUND


def test_every_prompt_is_accounted_for(run: Run) -> None:
    lines = step_lines(run.folder)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert run.account.num_used == sum(line["rollout/generated_groups"] for line in lines) * NUM_SAMPLES
    assert run.account.lost == {}


# --- those that join --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1])
def test_weights_and_canaries_come_before_the_first_request(run: Run, number: int) -> None:
    calls = [one["call"] for one in run.asked if one["server"] == run.name_of(number)]
    assert calls.count("generate") >= joining.LEAVES_AFTER
    assert calls[: calls.index("generate")] == [call for call in joining.CALLS if call != "generate"]


def test_as_many_servers_hold_the_weights_as_there_are(run: Run) -> None:
    more = [line["weight_sync/servers"] - streamed.NUM_SERVERS[run.engine] for line in step_lines(run.folder)]
    assert more[: JOINED_IN + 1] == [0] * JOINED_IN + [2]
    assert more[-1] == 0


def test_what_they_were_asked_when_they_left_is_asked_of_others(run: Run) -> None:
    assert sum(line["rollout/requests_resent"] for line in step_lines(run.folder)) >= 2
    assert all(one["error"] == "" for step in range(NUM_STEPS) for one in records(run.folder, step))


def test_who_is_asked_to_leave_takes_back_what_it_has_announced(run: Run) -> None:
    """Who is killed does not: the run gives its server up, and says so in its place."""
    assert run.status == [0, -signal.SIGKILL]
    left = sorted(path.name for path in (run.folder / "servers" / "joined").iterdir())
    assert left == ["finished", f"{run.name_of(1)}.given-up"]
