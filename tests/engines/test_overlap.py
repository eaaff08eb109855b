"""Runs that train on one step while real servers write for the next one, and take new weights meanwhile.

SGLang's run has two nodes with a server each, vLLM's has one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from megatron_fipo.parallel.local_ranks import RankError
from tests.end_to_end import kills
from tests.end_to_end.runs import step_lines
from tests.engines import streamed
from tests.engines.accounts import BOUND, NUM_SAMPLES, Account, account_for, records

NUM_STEPS = 6
OVERLAPS = (
    f"train.num_steps={NUM_STEPS}",
    f"rollout.max_staleness_steps={BOUND}",
    "rollout.overlap=true",
    "servers.max_concurrent_requests=16",
    "evaluation.every_num_steps=0",
    "optimizer.learning_rate=1e-4",
)
KILLED_IN = 3
TOLERANCE = 1e-4


@dataclass
class Run:
    """A run that was killed between the updates of a step, while the next one was being generated, and finished."""

    folder: Path
    account: Account


@pytest.fixture(
    scope="module",
    params=[pytest.param("sglang", marks=pytest.mark.sglang), pytest.param("vllm", marks=pytest.mark.vllm)],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    engine: str = request.param
    folder = tmp_path_factory.mktemp(engine) / "run"
    with streamed.running_servers(engine, folder.parent / "logs") as urls:
        victim = partial(streamed.on_rank, len(urls) - 1, partial(kills.in_update, step=KILLED_IN, num_done=1))
        with pytest.raises(RankError):
            streamed.stream(folder, engine, urls, "killed", *OVERLAPS, prepare=victim)
        streamed.wait_until_idle(engine, urls)
        streamed.stream(folder, engine, urls, "finished", *OVERLAPS, prepare=streamed.nothing, expected=0)
        assert sum(streamed.num_requests(engine, url) for url in urls) == 0, "all that was begun has ended"
    return Run(folder, account_for(folder, NUM_STEPS))


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
