"""What goes wrong with SGLang servers, done to real ones: nothing is lost or doubled, or the run stops and says why."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch import Tensor

from megatron_fipo.config import ServersSection
from megatron_fipo.rl.trajectory import Trajectory
from megatron_fipo.rollout.servers import snapshots
from megatron_fipo.rollout.servers.api import LaunchSpec
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.server import Server, State
from megatron_fipo.rollout.servers.sglang.launch import SglangAdapter
from tests.engines.caching import PROMPT
from tests.engines.guarding import JSON, WITH_KEY, ask, expect_key_nowhere, expect_strangers_refused
from tests.engines.serving import SIZES, Serving, launch_spec, request
from tests.models import save_random_model

pytestmark = pytest.mark.sglang

NUM_SAMPLES, NUM_TOKENS = 32, 300


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """Two servers behind a router; both hold the second model."""
    settings = ServersSection(start_timeout_s=300.0, health_interval_s=1.0, health_timeout_s=45.0, max_restarts=5)
    folder = tmp_path_factory.mktemp("faults")
    serving = Serving("sglang", folder, num_servers=2, router=True, stop=(), settings=settings)
    serving.hold(model=1, version=1)
    yield serving
    serving.close()


def expect_whole(serving: Serving, samples: list[Trajectory], model: int = 1) -> None:
    """Every request has its own answer, whole, under the right weights."""
    assert [(sample.prompt_id, sample.sample_index) for sample in samples] == [
        divmod(index, 4) for index in range(len(samples))
    ]
    assert len({tuple(sample.response_ids.tolist()) for sample in samples}) == len(samples)
    for sample in samples:
        assert sample.finish_reason == "length"
        assert len(sample.response_ids) == NUM_TOKENS
        serving.expect_log_probs(sample, model)


def pid_of(server: Server) -> int:
    assert server.process is not None
    assert server.process.pid is not None
    return server.process.pid


def find_decoding(serving: Serving) -> Callable[[], Server | None]:
    """Finds a server that has written tokens since now: the router sends requests where it likes."""
    starts = {server.name: server.log.stat().st_size for server in serving.pool.servers if server.log is not None}

    def find() -> Server | None:
        for server in serving.pool.servers:
            assert server.log is not None
            if b"Decode batch" in server.log.read_bytes()[starts[server.name] :]:
                return server
        return None

    return find


def wait_until_ready(serving: Serving) -> float:
    """Seconds until all servers are."""
    start = time.monotonic()

    async def wait() -> None:
        async with serving.pool.roster._changed:
            while not all(server.state is State.READY for server in serving.pool.servers):
                gone = [server.reason for server in serving.pool.servers if server.state is State.LOST]
                assert not gone, gone
                await serving.pool.roster._changed.wait()

    serving.loop.run(wait())
    return time.monotonic() - start


def test_generation_goes_through_the_router(serving: Serving) -> None:
    assert serving.pool.usable_router is not None
    expect_whole(serving, serving.generate(*(request(index, NUM_TOKENS) for index in range(NUM_SAMPLES))))
    assert serving.engine.metrics()["rollout/requests_resent"].value() == 0


def test_the_salt_of_the_cache_gets_through_the_router(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    def cached_share() -> float:
        assert serving.pool.usable_router is not None
        serving.engine.metrics()
        serving.generate(replace(request(0, 2), prompt_ids=PROMPT))
        return serving.engine.metrics()["rollout/cached_prompt_share"].value()

    assert max(cached_share() for _ in range(3)) > 0.5, "one of the two servers gets it twice"
    for server in serving.pool.servers:
        monkeypatch.setattr(server.client, "_cache_salt", "that of other weights")
    assert cached_share() == 0


def test_strangers_and_web_pages_are_refused(serving: Serving) -> None:
    """By the servers on every route but the one that tells that they live, and by the router before them."""
    posts = ["/update_weights_from_tensor", "/release_memory_occupation", "/flush_cache", "/generate", "/abort_request"]
    for server in serving.pool.servers:
        expect_strangers_refused(server.client.url, ["/model_info", "/health_generate", "/openapi.json"], posts)
        assert ask(server.client.url, "/health") == (200, "{}")
    assert serving.pool.router is not None
    generating = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2}}
    assert ask(serving.pool.router.url, "/generate", generating, JSON)[0] == 401
    assert ask(serving.pool.router.url, "/workers", {"url": "http://127.0.0.1:9"}, JSON)[0] == 401
    assert ask(serving.pool.router.url, "/generate", generating, JSON | WITH_KEY)[0] == 200
    log = serving.pool.servers[0].log
    assert log is not None
    assert b"(the run's key)" in log.read_bytes(), "SGLang logs its arguments"
    expect_key_nowhere(serving, log.parents[1])


@pytest.mark.parametrize(
    "direct", [pytest.param(True, id="round-robin", marks=pytest.mark.long), pytest.param(False, id="router")]
)
def test_kill_9_in_mid_generation(serving: Serving, direct: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_ready(serving)
    if direct:
        monkeypatch.setattr(serving.pool, "router", None)
    find, victims, restarts = find_decoding(serving), list[Server](), serving.pool.num_restarts

    def kill() -> None:
        victim = find()
        assert victim is not None
        victims.append(victim)
        os.kill(pid_of(victim), signal.SIGKILL)

    start = time.monotonic()
    requests = [request(index, NUM_TOKENS) for index in range(NUM_SAMPLES)]
    samples = serving.generate(*requests, meanwhile=kill, when=lambda: find() is not None)
    finished = time.monotonic() - start
    expect_whole(serving, samples)
    back = wait_until_ready(serving)
    print(f"\nkill -9, direct={direct}: step took {finished:.1f} s, server back after {back:.1f} s more")
    assert serving.pool.num_restarts == restarts + 1
    # It came back with the weights of the last update, not with the model that it was first started with.
    sample = _generate_at(serving, victims[0])
    serving.expect_log_probs(sample, model=1)
    assert sample.policy_versions == [(1, 0, NUM_TOKENS)]


def _generate_at(serving: Serving, server: Server) -> Trajectory:
    """One sample from a certain server."""
    pool, router = serving.pool, serving.pool.router
    others = [other for other in pool.servers if other is not server]
    pool.router = None
    for other in others:
        other.state = State.HELD
    pool._affinity.clear()
    try:
        (sample,) = serving.generate(request(0, NUM_TOKENS))
    finally:
        pool.router = router
        serving.loop.run(pool.let_go(others))
    return sample


def test_a_server_that_hangs_is_killed_and_its_requests_sent_again(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until_ready(serving)
    monkeypatch.setattr(serving.pool, "router", None)  # so that it is known who generates what
    serving.engine.metrics()
    find, processes = find_decoding(serving), list[psutil.Process]()

    def hang() -> None:
        victim = find()
        assert victim is not None
        processes.append(psutil.Process(pid_of(victim)))
        processes.extend(processes[0].children(recursive=True))
        for process in processes:
            process.suspend()

    start = time.monotonic()
    requests = [request(index, NUM_TOKENS) for index in range(NUM_SAMPLES)]
    samples = serving.generate(*requests, meanwhile=hang, when=lambda: find() is not None)
    finished = time.monotonic() - start
    expect_whole(serving, samples)
    assert serving.engine.metrics()["rollout/requests_resent"].value() > 0
    back = wait_until_ready(serving)
    print(f"\nhang: step took {finished:.1f} s, server back after {back:.1f} s more")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


class CuttingProxy:
    """Passes bytes to a server and back, and breaks each of its first connections off in mid-answer."""

    def __init__(self, port: int, num_cuts: int) -> None:
        self._target, self.num_left = port, num_cuts
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._target)) as server:
            request_bytes = b""
            while b"\r\n\r\n" not in request_bytes:
                request_bytes += client.recv(65536)
            head, _, body = request_bytes.partition(b"\r\n\r\n")
            lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            missing = (int(lengths[0].split(b":")[1]) if lengths else 0) - len(body)
            while missing > 0:
                more = client.recv(65536)
                missing -= len(more)
                request_bytes += more
            server.sendall(request_bytes)
            cut = head.startswith(b"POST /generate") and self.num_left > 0
            if cut:
                self.num_left -= 1
                client.sendall(server.recv(400))  # the head and a little of the body
                return
            while data := server.recv(65536):
                client.sendall(data)

    def close(self) -> None:
        self._listener.close()


def test_an_answer_cut_short_is_asked_for_again(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_until_ready(serving)
    serving.engine.metrics()
    monkeypatch.setattr(serving.pool, "router", None)
    proxies = []
    for client in serving.clients:
        proxy = CuttingProxy(int(client.url.rpartition(":")[2]), num_cuts=2)
        proxies.append(proxy)
        monkeypatch.setattr(client._connection, "url", f"http://127.0.0.1:{proxy.port}")  # type: ignore[attr-defined]
    restarts = serving.pool.num_restarts
    start = time.monotonic()
    expect_whole(serving, serving.generate(*(request(index, NUM_TOKENS) for index in range(NUM_SAMPLES))))
    print(f"\ncut short: step took {time.monotonic() - start:.1f} s")
    assert [proxy.num_left for proxy in proxies] == [0, 0]
    assert serving.engine.metrics()["rollout/requests_resent"].value() == 4
    assert serving.pool.num_restarts == restarts  # nothing was wrong with the servers
    for proxy in proxies:
        proxy.close()


def test_a_server_that_dies_in_an_update_comes_back_with_the_new_weights(
    serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose snapshot is still being written then."""
    may_write, save_file = threading.Event(), snapshots.save_file

    def save(*arguments: Any, **keywords: Any) -> None:
        may_write.wait()
        save_file(*arguments, **keywords)

    monkeypatch.setattr(snapshots, "save_file", save)
    wait_until_ready(serving)
    victim = serving.pool.servers[0]
    weights = serving.weights(0)

    def stream() -> Iterator[tuple[str, Tensor]]:
        for number, pair in enumerate(weights):
            if number == len(weights) // 2:
                os.kill(pid_of(victim), signal.SIGKILL)
            yield pair

    start = time.monotonic()
    try:
        serving.engine.update_weights(stream(), 2)
        arrived = serving.pool.arrived
        assert arrived is not None
        assert arrived.folder is not None
        assert (arrived.version, arrived.folder.done(), victim.state) == ("2", False, State.RESTARTING)
    finally:
        may_write.set()
    back = wait_until_ready(serving)
    print(f"\nkill -9 in an update: update and restart took {time.monotonic() - start:.1f} s, restart {back:.1f} s")
    sample = _generate_at(serving, victim)
    assert sample.policy_versions == [(2, 0, NUM_TOKENS)]
    serving.expect_log_probs(sample, model=0)


def test_when_no_server_is_left_the_run_stops_with_its_last_words(serving: Serving) -> None:
    """The last one here: both servers have used up their restarts, or use them up now."""
    wait_until_ready(serving)
    for server in serving.pool.servers:
        server.num_restarts = serving.pool.settings.max_restarts

    def kill() -> None:
        for server in serving.pool.servers:
            os.kill(pid_of(server), signal.SIGKILL)

    start = time.monotonic()
    with pytest.raises(ServerError, match=r"(?s)no server can generate.*was ended by signal 9.*servers\.max_restarts"):
        serving.generate(*(request(index, NUM_TOKENS) for index in range(8)), meanwhile=kill)
    print(f"\nno server left: stopped after {time.monotonic() - start:.1f} s")
    with pytest.raises(ServerError, match="no server is left"):
        serving.hold(model=1, version=3)


# --- faults of a start -----------------------------------------------------------------------------------------------


def failing_start(spec: LaunchSpec, folder: Path) -> str:
    """What a pool says whose one server cannot start; nothing of it may be left."""
    loop = EventLoopThread()
    pool = ServerPool(
        SglangAdapter(),
        [spec],
        ServersSection(start_timeout_s=300.0),
        log_folder=folder,
    )
    start = time.monotonic()
    with pytest.raises(ServerError) as caught:
        loop.run(pool.start())
    print(f"\nstopped after {time.monotonic() - start:.1f} s: {str(caught.value)[:300]}")
    loop.stop()
    return str(caught.value)


def test_a_taken_port(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", **SIZES)
    spec = launch_spec("sglang", model)
    with socket.create_server(("127.0.0.1", spec.port)):
        assert f"port {spec.port} of 127.0.0.1, where sglang-0 should listen, is taken" in failing_start(spec, tmp_path)


def test_a_wrong_model(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", **SIZES)
    config = model / "config.json"
    config.write_text(config.read_text().replace("Qwen2ForCausalLM", "Qwen2ForCausalTypos"))
    words = failing_start(launch_spec("sglang", model), tmp_path)
    assert "Qwen2ForCausalTypos" in words


def test_too_little_memory(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", **SIZES)
    spec = replace(launch_spec("sglang", model), max_total_tokens=None, memory_fraction=0.0001)
    assert "--mem-fraction-static" in failing_start(spec, tmp_path)
