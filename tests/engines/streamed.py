"""Runs that stream from running servers: how they are interrupted, and what is watched in them."""

from __future__ import annotations

import json
import os
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import ServersSection
from megatron_fipo.parallel.local_ranks import RankError
from megatron_fipo.rollout.engine import GenerationRequest, Turn
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.plugins.server_guard import bearer
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.setup import ADAPTERS
from megatron_fipo.rollout.stream import Stream
from megatron_fipo.system.exit_codes import EXIT_STOPPED
from tests.end_to_end import kills
from tests.end_to_end.runs import BASE, ROOT, Preparation, train
from tests.engines.accounts import NUM_PROMPTS, NUM_SAMPLES, last_recorded_step, records
from tests.engines.attaching import KEY_ENV
from tests.engines.serving import KEY, launch_spec

PATIENCE_S = 600.0
NUM_SERVERS = {"sglang": 2, "vllm": 1}
"""SGLang's run has two nodes with a server each; vLLM's has one."""
ARGUMENTS = {"sglang": (), "vllm": ("--block-size", "32")}
"""vLLM's prefix cache knows whole blocks only, of 128 tokens on the CPU: longer than any sequence here."""
MOST_REQUESTS = {"sglang": 256, "vllm": 8}
"""At each server: all that a step begins, or so few that others are in flight when those of the batch are done."""


@contextmanager
def running_servers(engine: str, folder: Path) -> Iterator[list[str]]:
    """Servers of the quick-start's model that nobody has attached to yet; their addresses."""
    loop = EventLoopThread()
    specs = [
        replace(launch_spec(engine, ROOT / BASE, index=index), extra_args=ARGUMENTS[engine])
        for index in range(NUM_SERVERS[engine])
    ]
    # A health probe would count among what a server works on.
    settings = ServersSection(start_timeout_s=300.0, health_interval_s=PATIENCE_S)
    pool = ServerPool(ADAPTERS[engine](), specs, settings, log_folder=folder)
    loop.run(pool.start())
    try:
        yield [server.client.url for server in pool.servers]
    finally:
        loop.run(pool.close())
        loop.stop()


def num_requests(engine: str, url: str) -> int:
    """How many requests a server works on or has waiting, as it says itself."""
    if engine == "vllm":
        _step_once(url)
    text = _asked(url + {"sglang": "/v1/loads?include=core", "vllm": "/metrics"}[engine])
    if engine == "sglang":
        return sum(load["num_running_reqs"] + load["num_waiting_reqs"] for load in json.loads(text)["loads"])
    counts = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    ]
    assert len(counts) == 2, text
    return int(sum(counts))


def _step_once(url: str) -> None:
    """Have a vLLM server write one token: its counts are those after its last step.

    It answers the requests that it is told to abort before its engine takes them out.
    """
    sampling = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
    _asked(url + "/inference/v1/generate", {"token_ids": [0], "sampling_params": sampling})


def _asked(address: str, body: dict[str, Any] | None = None) -> str:
    """The text that a server answers to a GET, or to a POST of a body."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": bearer(KEY), "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def wait_until_idle(engine: str, urls: Sequence[str]) -> None:
    """Servers end what nobody waits for any more."""
    deadline = time.monotonic() + PATIENCE_S
    while any(num_requests(engine, url) for url in urls):
        assert time.monotonic() < deadline, "a killed run's requests stay on the server"
        time.sleep(0.1)


def stream(
    folder: Path,
    engine: str,
    urls: Sequence[str],
    launch: str,
    *overrides: str,
    prepare: Preparation,
    expected: int | None = None,
) -> None:
    """Train three steps on running servers, of which each rank attaches to some if there is more than one.

    Args:
        launch: a name for what is seen in it.
        overrides: come last.
    """
    train(
        folder,
        "train.num_steps=3",
        "train.resume=true",
        f"rollout.engine={engine}",
        f"servers.urls=[{','.join(urls)}]",
        f"servers.api_key_env={KEY_ENV}",
        f"servers.health_interval_s={PATIENCE_S}",
        "sampling.streaming=true",
        "sampling.max_surplus_age_steps=0",
        f"rollout.num_prompts={NUM_PROMPTS}",
        f"rollout.num_samples_per_prompt={NUM_SAMPLES}",
        "data.train.chains.params.num_terms=7",  # from two terms on: responses from 6 tokens to 96
        "optimizer.num_warmup_steps=1",
        "optimizer.learning_rate=3e-4",
        f"servers.max_concurrent_requests={MOST_REQUESTS[engine]}",
        "sampling.max_generation_rounds=50",  # few groups have a signal where updates are that large
        *overrides,
        prepare=partial(_prepare, engine, len(urls) > 1, folder.with_suffix(".seen"), launch, prepare),
        expected=expected,
        timeout_s=PATIENCE_S,
    )


@dataclass
class Interrupted:
    """A run that was asked to leave in a stream, killed in one when it went on, and then finished."""

    engine: str
    folder: Path
    signalled_in: int
    """The first of these steps."""
    at_signal: list[dict[str, Any]]
    """What was recorded of it when the run had left."""
    load_at_signal: int
    """Requests that servers still had then."""
    killed_in: int
    """The second one."""
    at_kill: list[dict[str, Any]]
    """What was recorded of it when the run had been killed."""


def interrupted(
    engine: str, folder: Path, urls: Sequence[str], *overrides: str, signalled_in: int, killed_in: int
) -> Interrupted:
    """Train, with one interruption in each of the two steps: where it can be, not of the rank that keeps the books.

    Where one of them judges too little, the interruption comes in a later one.
    """
    victim = NUM_SERVERS[engine] - 1
    signalled = partial(on_rank, victim, partial(kills.signalled_in_stream, step=signalled_in, num_samples=3))
    stream(folder, engine, urls, "signalled", *overrides, prepare=signalled, expected=EXIT_STOPPED)
    signalled_in = last_recorded_step(folder)
    at_signal, load = records(folder, signalled_in), sum(num_requests(engine, url) for url in urls)
    killed = partial(on_rank, victim, partial(kills.in_stream, step=killed_in, num_samples=3))
    with pytest.raises(RankError):
        stream(folder, engine, urls, "killed", *overrides, prepare=killed)
    killed_in = last_recorded_step(folder)
    at_kill = records(folder, killed_in)
    wait_until_idle(engine, urls)
    stream(folder, engine, urls, "finished", *overrides, prepare=nothing, expected=0)
    return Interrupted(engine, folder, signalled_in, at_signal, load, killed_in, at_kill)


# --- on ranks --------------------------------------------------------------------------------------------------------


def nothing() -> None:
    """The run goes on to its end."""


def on_rank(rank: int, action: Callable[[], None]) -> None:
    """Do something on one rank alone."""
    if int(os.environ["RANK"]) == rank:
        action()


def _prepare(engine: str, is_node: bool, seen: Path, launch: str, then: Preparation) -> None:
    os.environ[KEY_ENV] = KEY
    if is_node:
        os.environ["LOCAL_RANK"] = "0"  # a node of its own, which owns servers
    RolloutLedger.forget_before = lambda self, step: None  # type: ignore[method-assign]
    note = partial(_note, seen, launch=launch)
    _watch_ends(engine, note)
    _watch_updates(engine, note)
    then()


def _note(seen: Path, **what: Any) -> None:
    with seen.open("a") as file:
        file.write(json.dumps({"rank": int(os.environ["RANK"]), **what}) + "\n")


def _load(engine: str, servers: ServerEngine) -> int:
    assert servers.owned is not None
    own = [server for server in servers.owned.pool.servers if not server.may_leave]
    return sum(num_requests(engine, server.client.url) for server in own)


def _watch_ends(engine: str, note: Callable[..., None]) -> None:
    """Note how many responses a stream's end has cut short, and how many servers still have then."""
    abort, aborted = Stream._abort, [0]

    async def watched(self: Stream) -> None:
        await abort(self)
        load = _load(engine, self._engine)  # type: ignore[arg-type]
        note(at="end", step=self._step, aborted=aborted[0], load=load)
        aborted[0] = 0

    Stream._abort = watched  # type: ignore[method-assign]
    generate = ServerEngine.generate

    async def counted(self: ServerEngine, request: GenerationRequest) -> Turn:
        turn = await generate(self, request)
        aborted[0] += turn.finish_reason == "abort"
        return turn

    ServerEngine.generate = counted  # type: ignore[method-assign]


def _watch_updates(engine: str, note: Callable[..., None]) -> None:
    """Note what servers work on before they are given weights."""
    update = ServerEngine.update_weights

    def watched(self: ServerEngine, tensors: Any, policy_version: int) -> None:
        if self.owned is not None:
            note(at="update", version=policy_version, load=_load(engine, self))
        update(self, tensors, policy_version)

    ServerEngine.update_weights = watched  # type: ignore[method-assign]


def seen_by(folder: Path) -> list[dict[str, Any]]:
    """What the ranks of all launches of a run have noted, in order."""
    return [json.loads(line) for line in folder.with_suffix(".seen").read_text().splitlines()]
