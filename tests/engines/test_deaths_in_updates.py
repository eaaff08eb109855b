"""Real servers that are killed in the middle of an update of their weights: the update goes on with the other one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psutil
import pytest
from torch import Tensor

from megatron_fipo.config import ServersSection
from megatron_fipo.parallel.external_group import ExternalGroup
from megatron_fipo.rollout.servers.api import InferenceServer
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.proof import canary_sequences
from megatron_fipo.rollout.servers.server import Server, State
from megatron_fipo.rollout.servers.transfers import DistributedTransfer, Method
from tests.engines.serving import VOCABULARY, Serving, request, scores

NUM_TOKENS = 24
ENGINES = [pytest.param("sglang", marks=pytest.mark.sglang), pytest.param("vllm", marks=pytest.mark.vllm)]
MOMENTS = [
    pytest.param("tensor", "load_bucket", 3, marks=pytest.mark.long),
    pytest.param("distributed", "receive_bucket", 3),
    pytest.param("distributed", "join_group", 0, marks=pytest.mark.long),
    pytest.param("distributed", "checksums", 0, marks=pytest.mark.long),
    pytest.param("disk", "load_folder", 0, marks=pytest.mark.long),
]
"""Way of the weights, question in which one of two servers is killed, how many such questions it answers before."""


@pytest.fixture(scope="module", params=ENGINES)
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    settings = ServersSection(start_timeout_s=300.0, health_timeout_s=45.0, max_restarts=100)
    folder = tmp_path_factory.mktemp("deaths")
    serving = Serving(request.param, folder, num_servers=2, stop=(), settings=settings)
    yield serving
    serving.close()


class Updates:
    """Updates of both servers, by turns with the weights of two models."""

    def __init__(self, serving: Serving) -> None:
        self.serving, self.version = serving, 0

    @property
    def model(self) -> int:
        return self.version % 2

    def run(self, method: Method, stream: Callable[[Iterator[tuple[str, Tensor]]], Any] = iter) -> float:
        """The next one, with its canary; how many seconds it took."""
        self.version += 1
        self.serving.owned.sync = self.serving.sync(method)
        start = time.monotonic()
        try:
            self.serving.engine.update_weights(stream(iter(self.serving.weights(self.model))), self.version)
            took = time.monotonic() - start
            sequences = canary_sequences(VOCABULARY, 2, num_tokens=16)
            expected = [scores(self.serving.models[self.model], sequence).tolist() for sequence in sequences]
            self.serving.engine.check_log_probs(sequences, expected)
        finally:
            self.serving.owned.sync.close()
        return took

    def expect_at(self, server: Server) -> None:
        """A server generates with the weights of the last update."""
        pool = self.serving.pool
        others = [other for other in pool.servers if other is not server and other.state is State.READY]
        for other in others:
            other.state = State.HELD
        pool._affinity.clear()
        try:
            (sample,) = self.serving.generate(request(0, NUM_TOKENS))
        finally:
            self.serving.loop.run(pool.let_go(others))
        assert sample.policy_versions == [(self.version, 0, NUM_TOKENS)]
        self.serving.expect_log_probs(sample, self.model)


@pytest.fixture(scope="module")
def updates(serving: Serving) -> Updates:
    return Updates(serving)


def pid_of(server: Server) -> int:
    assert server.process is not None
    assert server.process.pid is not None
    return server.process.pid


def kill_when_asked(
    patch: pytest.MonkeyPatch, client: InferenceServer, route: str, num_answered: int, kill: Callable[[], None]
) -> None:
    """Kill a server as it is asked something."""
    ask, num_asked = getattr(client, route), 0

    async def ask_and_kill(*arguments: Any, **keywords: Any) -> Any:
        nonlocal num_asked
        num_asked += 1
        if num_asked == num_answered + 1:
            kill()
        return await ask(*arguments, **keywords)

    patch.setattr(client, route, ask_and_kill)


def wait_until_ready(serving: Serving) -> None:
    async def wait() -> None:
        await serving.pool.roster.wait_until(
            lambda: all(server.state in (State.READY, State.LOST) for server in serving.pool.servers)
        )

    serving.loop.run(wait())
    assert serving.pool.roster.reasons() == ""


@pytest.mark.parametrize(("method", "route", "num_answered"), MOMENTS, ids=lambda value: str(value))
def test_kill_9_in_an_update(
    updates: Updates,
    method: Method,
    route: str,
    num_answered: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    serving, (other, victim) = updates.serving, updates.serving.pool.servers
    wait_until_ready(serving)
    restarts = serving.pool.num_restarts
    with monkeypatch.context() as patch:
        kill = partial(os.kill, pid_of(victim), signal.SIGKILL)
        kill_when_asked(patch, victim.client, route, num_answered, kill)
        took = updates.run(method)
    assert "did not answer within" not in victim.reason + caplog.text, "nobody waits for what a dead one will not do"
    updates.expect_at(other)
    start = time.monotonic()
    wait_until_ready(serving)
    print(f"\n{route} of {method}: the update took {took:.1f} s, the restart {time.monotonic() - start:.1f} s more")
    assert serving.pool.num_restarts == restarts + 1
    updates.expect_at(victim)
    updates.run(method)
    for server in serving.pool.servers:
        updates.expect_at(server)


def test_a_bucket_that_is_sent_again_is_taken_over_once(updates: Updates, monkeypatch: pytest.MonkeyPatch) -> None:
    """As each is to those that had it, when one dies. vLLM would take a layer for whole by what came twice."""
    broadcast = DistributedTransfer._broadcast

    def broadcast_twice(*arguments: Any) -> bool:
        return broadcast(*arguments) and broadcast(*arguments)

    monkeypatch.setattr(DistributedTransfer, "_broadcast", broadcast_twice)
    updates.run("distributed")
    for server in updates.serving.pool.servers:
        updates.expect_at(server)


@pytest.mark.long
def test_the_process_that_computes_is_killed_and_the_one_that_answers_is_not(
    updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGLang ends itself then. vLLM may not answer any more, and counts as hung when the bucket's time is up."""
    serving, (other, victim) = updates.serving, updates.serving.pool.servers
    wait_until_ready(serving)

    def kill() -> None:
        workers = psutil.Process(pid_of(victim)).children(recursive=True)
        names = [" ".join([worker.name(), *worker.cmdline()]) for worker in workers]
        computing = [w for w, name in zip(workers, names, strict=True) if "scheduler" in name or "EngineCore" in name]
        assert computing, names
        for worker in computing:
            worker.kill()

    with monkeypatch.context() as patch:
        kill_when_asked(patch, victim.client, "receive_bucket", 2, kill)
        took = updates.run("distributed")
    print(f"\nthe process that computes: the update took {took:.1f} s")
    updates.expect_at(other)
    wait_until_ready(serving)
    updates.expect_at(victim)


@pytest.mark.long
def test_kill_9_of_both_in_an_update(updates: Updates, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come back with the weights of this update, from its snapshot."""
    serving = updates.serving
    wait_until_ready(serving)
    with monkeypatch.context() as patch:
        for server in serving.pool.servers:
            kill = partial(os.kill, pid_of(server), signal.SIGKILL)
            kill_when_asked(patch, server.client, "receive_bucket", 2, kill)
        updates.run("distributed")
    wait_until_ready(serving)
    for server in serving.pool.servers:
        updates.expect_at(server)


def test_wrong_weights_of_the_one_that_is_left_still_stop_the_run(
    updates: Updates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: one server is killed, and the other is sent a wrong byte in every bucket from then on.

    In the one that is sent again, too; but of that it may have taken over all before the other one died.
    """
    serving, (_, victim) = updates.serving, updates.serving.pool.servers
    wait_until_ready(serving)
    broadcast, is_dead = ExternalGroup.broadcast, False

    def kill() -> None:
        nonlocal is_dead
        is_dead = True
        os.kill(pid_of(victim), signal.SIGKILL)

    def spoil(group: ExternalGroup, tensor: Tensor, check: Callable[[], object]) -> None:
        if is_dead and group._world_size == 2:
            tensor = tensor.clone()
            tensor[0] ^= 1
        broadcast(group, tensor, check)

    with monkeypatch.context() as patch:
        kill_when_asked(patch, victim.client, "receive_bucket", 2, kill)
        patch.setattr(ExternalGroup, "broadcast", spoil)
        with pytest.raises(
            ServerError, match=r"-0 .* does not hold the weights that were sent to it: \d+ tensors differ"
        ):
            updates.run("distributed")
    with pytest.raises(ServerError, match="no server can generate"):
        serving.generate(request(0, NUM_TOKENS))
