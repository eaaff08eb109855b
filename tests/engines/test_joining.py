"""Servers that join a run while it goes on, started by `megatron-fipo serve`, and leave it: asked to, and killed.

SGLang's run has two nodes with a server each, vLLM's has one. The run overlaps, so that requests are in flight then.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from megatron_fipo.actor.actor import Actor
from megatron_fipo.rollout.servers.sglang.client import SglangServer
from megatron_fipo.rollout.servers.vllm.client import VllmServer
from tests.end_to_end.runs import QUICKSTART, ROOT, SMALL, step_lines
from tests.engines import streamed
from tests.engines.accounts import BOUND, NUM_SAMPLES, Account, account_for, records
from tests.engines.environments import server_python

NUM_STEPS = 6
JOIN_IN = 2
"""The step whose handover takes both of them in."""
LEAVES_AFTER = 6
"""The one is asked to leave, and the other killed, when it has been asked for so many responses."""
TOLERANCE = 1e-4
OVERRIDES = (
    f"train.num_steps={NUM_STEPS}",
    f"rollout.max_staleness_steps={BOUND}",
    "rollout.overlap=true",
    "servers.max_concurrent_requests=16",
    "servers.health_timeout_s=5",
    "evaluation.every_num_steps=0",
    "optimizer.learning_rate=1e-4",
)
CLIENTS: dict[str, type[Any]] = {"sglang": SglangServer, "vllm": VllmServer}


@dataclass
class Run:
    """What is left of the run, and of those who served for it."""

    engine: str
    folder: Path
    account: Account
    asked: list[dict[str, Any]]
    """What the servers that joined were asked, in order."""
    said: list[str]
    """What each of the two commands has said."""
    status: list[int]
    """Their exit statuses."""


@contextmanager
def serving(engine: str, folder: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command, for the run in a folder."""
    command = [sys.executable, "-m", "megatron_fipo.cli", "serve", QUICKSTART, *SMALL, "--host", "127.0.0.1"]
    command += [
        f"run.output_dir={folder}",
        f"rollout.engine={engine}",
        f"servers.python={server_python(engine)}",
        "servers.max_concurrent_requests=16",
        f"servers.extra_args=[{','.join(streamed.ARGUMENTS[engine])}]",
    ]
    with log.open("wb") as output, subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(
    scope="module",
    params=[pytest.param("sglang", marks=pytest.mark.sglang), pytest.param("vllm", marks=pytest.mark.vllm)],
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    engine: str = request.param
    parent = tmp_path_factory.mktemp(engine)
    folder, logs = parent / "run", [parent / "first.log", parent / "second.log"]
    with (
        streamed.running_servers(engine, parent / "logs") as urls,
        serving(engine, folder, logs[0]) as first,
        serving(engine, folder, logs[1]) as second,
    ):
        pids = [first.pid, second.pid]
        prepare = partial(_prepare, engine, parent / "asked", folder / "servers" / "joined", logs, pids)
        streamed.stream(folder, engine, urls, "whole", *OVERRIDES, prepare=prepare, expected=0)
        status = [process.wait(streamed.PATIENCE_S) for process in (first, second)]
    asked = [json.loads(line) for line in (parent / "asked").read_text().splitlines()]
    said = [log.read_text() for log in logs]
    return Run(engine, folder, account_for(folder, NUM_STEPS), asked, said, status)


def name_of(run: Run, number: int) -> str:
    """The server that one of the two commands has started."""
    (name,) = {one["server"] for one in run.asked if one["server"] in run.said[number]}
    return str(name)


@pytest.mark.parametrize("number", [0, 1])
def test_weights_and_canaries_come_before_the_first_request(run: Run, number: int) -> None:
    calls = [one["call"] for one in run.asked if one["server"] == name_of(run, number)]
    assert calls.count("generate") >= LEAVES_AFTER
    before = calls[: calls.index("generate")]
    wanted = ["info", "pause", "end_update", "checksums", "score", "score_end"]
    assert [call for call in before if call in wanted] == wanted


def test_as_many_servers_hold_the_weights_as_there_are(run: Run) -> None:
    more = [line["weight_sync/servers"] - streamed.NUM_SERVERS[run.engine] for line in step_lines(run.folder)]
    assert more[: JOIN_IN + 1] == [0] * JOIN_IN + [2]
    assert more[-1] == 0


def test_log_probs_are_the_actors(run: Run) -> None:
    for line in step_lines(run.folder):
        difference = line["mismatch/newest_version/log_prob_difference/absmax"]
        assert difference is None or difference < TOLERANCE
        assert line["canary/log_prob_difference/max"] < TOLERANCE
        assert line["rollout/staleness_steps/max"] <= BOUND


def test_what_they_were_asked_when_they_left_is_asked_of_others(run: Run) -> None:
    lines = step_lines(run.folder)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    assert sum(line["rollout/requests_resent"] for line in lines) >= 2
    assert run.account.num_used == sum(line["rollout/generated_groups"] for line in lines) * NUM_SAMPLES
    assert run.account.lost == {}
    assert all(one["error"] == "" for step in range(NUM_STEPS) for one in records(run.folder, step))


def test_who_is_asked_to_leave_takes_back_what_it_has_announced(run: Run) -> None:
    """Who is killed does not: the run gives its server up, and says so in its place."""
    assert run.status == [0, -signal.SIGKILL]
    left = sorted(path.name for path in (run.folder / "servers" / "joined").iterdir())
    assert left == ["finished", f"{name_of(run, 1)}.given-up"]


# --- on ranks --------------------------------------------------------------------------------------------------------


def _prepare(engine: str, asked: Path, joined: Path, logs: list[Path], pids: list[int]) -> None:
    _watch(CLIENTS[engine], asked, joined, logs, pids)
    if os.environ["RANK"] != "0":
        return
    update = Actor.update

    def waiting(self: Actor, microbatches: Any, loss_function: Any, step: int) -> Any:
        if step == JOIN_IN - 1:
            _until(lambda: len([*joined.glob("*.json")]) == 2)
        return update(self, microbatches, loss_function, step)

    Actor.update = waiting  # type: ignore[method-assign]


def _watch(client: type[Any], asked: Path, joined: Path, logs: list[Path], pids: list[int]) -> None:
    """Note what servers that join are asked, and have them leave."""
    names: dict[str, str] = {}
    num_requests: Counter[str] = Counter()

    def note(url: str, call: str) -> None:
        if call == "info":
            port = urlsplit(url).port
            for file in joined.glob("*.json"):
                if json.loads(file.read_text())["port"] == port:
                    names[url] = file.stem
        if url not in names:
            return
        with asked.open("a") as file:
            file.write(json.dumps({"server": names[url], "call": call}) + "\n")
        if call == "generate":
            num_requests[url] += 1
            if num_requests[url] == LEAVES_AFTER:
                number = next(number for number, log in enumerate(logs) if names[url] in log.read_text())
                os.kill(pids[number], (signal.SIGTERM, signal.SIGKILL)[number])

    for name in ("info", "pause", "end_update", "checksums", "score", "score_end", "generate"):
        setattr(client, name, _noted(getattr(client, name), name, note))


def _noted(method: Callable[..., Any], name: str, note: Callable[[str, str], None]) -> Callable[..., Any]:
    async def noted(self: Any, *args: Any, **keywords: Any) -> Any:
        note(self.url, name)
        return await method(self, *args, **keywords)

    return noted


def _until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + streamed.PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
