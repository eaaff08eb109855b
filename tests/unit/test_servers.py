"""Server processes and their guard, HTTP errors, the thread that asks, and what SGLang is told and answers."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
import torch

from megatron_fipo.config import Config, ConfigError, ServersSection, load_config, validate, warnings_for
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, check_request
from megatron_fipo.rollout.servers import process, process_guard
from megatron_fipo.rollout.servers.api import LaunchPlan, LaunchSpec, ServerAdapter
from megatron_fipo.rollout.servers.engine import EngineSettings, ServerEngine
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.http import (
    ANSWER_BYTES,
    ServerConnection,
    ServerError,
    ServerRefusedError,
    ServerUnreachableError,
    reading,
)
from megatron_fipo.rollout.servers.plugins import server_guard
from megatron_fipo.rollout.servers.plugins.server_guard import KEY_VARIABLE
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.process import ServerProcess, free_port, is_free
from megatron_fipo.rollout.servers.sglang.client import _completion
from megatron_fipo.rollout.servers.sglang.launch import SglangAdapter, router_plan
from megatron_fipo.rollout.servers.specs import launch_specs, shared_cores
from megatron_fipo.rollout.servers.vllm.launch import VllmAdapter

pytestmark = pytest.mark.slow

FAMILY = """
    import os, signal, subprocess, sys, time
    if "deaf" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    own = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    away = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print("children", own.pid, away.pid, os.environ.get("RANK"), os.environ.get("COLOUR"), flush=True)
    time.sleep(600)
"""
"""A server with a child in its session and one in another."""


def family(tmp_path: Path, *arguments: str) -> tuple[ServerProcess, list[int]]:
    """The process, and the ids of its children."""
    plan = LaunchPlan((sys.executable, "-c", textwrap.dedent(FAMILY), *arguments), {"COLOUR": "blue"})
    process = ServerProcess(plan, tmp_path / "log", grace_s=1.0)
    while not process.log_tail():
        assert process.exit_status is None
        time.sleep(0.01)
    return process, [int(word) for word in process.log_tail().split()[1:3]]


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


LEAVES = """
    import os, socket, sys, tempfile, time, uuid
    from multiprocessing.shared_memory import SharedMemory
    path = os.path.join(tempfile.gettempdir(), str(uuid.uuid4()))
    socket.socket(socket.AF_UNIX).bind(path)
    memory = SharedMemory(create=True, size=16)
    open("/dev/shm/" + os.path.basename(path) + "-0", "x").close()  # no tracker knows it
    print(path, memory.name, os.environ["TORCHINDUCTOR_CACHE_DIR"], flush=True)
    time.sleep(600)
"""
"""A server that leaves a socket and shared memory when it is killed, as vLLM and SGLang do."""


@pytest.mark.parametrize("temporary", ["t", "a/path/which/no/socket/fits/into/" + "x" * 60])
@pytest.mark.parametrize(
    "end", [ServerProcess.ask_to_end, ServerProcess.kill, lambda it: os.kill(it.pid, signal.SIGKILL)]
)
def test_a_server_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: str, end: Callable[[ServerProcess], None]
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        usual = Path(short) / temporary
        usual.mkdir(parents=True)
        monkeypatch.setenv("TMPDIR", str(usual))
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        process = ServerProcess(LaunchPlan((sys.executable, "-c", textwrap.dedent(LEAVES))), tmp_path / "log", 1.0)
        while "\n" not in process.log_tail():
            assert process.exit_status is None
            time.sleep(0.01)
        path, memory, compiled = process.log_tail().split()
        assert Path(path).is_socket()
        assert Path("/dev/shm", memory).exists()
        assert Path(path).parents[1] == (usual if temporary == "t" else Path("/tmp"))
        assert Path(compiled).parent == usual, "what was compiled is for the next server too"
        end(process)
        process.wait()
        assert not Path(path).parent.exists()
        assert not Path("/dev/shm", memory).exists()
        assert not Path("/dev/shm", f"{Path(path).name}-0").exists()
        assert list(usual.iterdir()) == []


@pytest.mark.parametrize("arguments", [(), ("deaf",)])
def test_a_server_ends_with_all_that_it_started(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    process, children = family(tmp_path, *arguments)
    assert process.pid is not None
    assert not any(is_gone(pid) for pid in (process.pid, *children))
    process.ask_to_end()
    process.wait()
    assert all(is_gone(pid) for pid in (process.pid, *children))
    assert process.exit_status == 128 + (signal.SIGKILL if arguments else signal.SIGTERM)


def test_a_server_that_hangs_can_be_killed(tmp_path: Path) -> None:
    process, children = family(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGSTOP)
    process.kill()
    assert all(is_gone(pid) for pid in (process.pid, *children))


def test_when_a_server_dies_its_children_go_too(tmp_path: Path) -> None:
    process, children = family(tmp_path)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.exit_status == 128 + signal.SIGKILL
    assert all(is_gone(pid) for pid in children)


def test_servers_end_when_their_owner_is_killed(tmp_path: Path) -> None:
    owner = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from megatron_fipo.rollout.servers.api import LaunchPlan\n"
            "from megatron_fipo.rollout.servers.process import ServerProcess\n"
            f"process = ServerProcess(LaunchPlan((sys.executable, '-c', {textwrap.dedent(FAMILY)!r})), "
            f"Path({str(tmp_path / 'log')!r}))\n"
            "print(process._guard.pid, process.pid, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(process_guard.__file__).parents[3],
    )
    assert owner.stdout is not None
    guard, server = map(int, owner.stdout.readline().split())
    owner.kill()
    owner.communicate()
    for pid in (guard, server):
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
        assert is_gone(pid)


def test_a_server_is_in_no_world_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    process, _ = family(tmp_path)
    assert process.log_tail().split()[3:] == ["None", "blue"]
    process.kill()


def test_an_interpreter_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"servers\.python=/no/python is not an executable file"):
        ServerProcess(LaunchPlan(("/no/python",)), tmp_path / "log")


def test_ports() -> None:
    port = free_port()
    assert is_free("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert not is_free("127.0.0.1", port)


@pytest.mark.parametrize(
    ("of_the_system", "allowed"),
    [
        ("32768\t60999\n", (*range(10240, 32768), *range(61000, 65536))),
        ("1024\t60000\n", range(60001, 65536)),
        ("20000\t65535\n", range(10240, 20000)),
    ],
)
def test_a_port_is_none_that_the_system_may_give_to_others_before_the_server_listens(
    of_the_system: str, allowed: Sequence[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text(of_the_system)
    monkeypatch.setattr(process, "_SYSTEMS_OWN", tmp_path / "range")
    ports = [free_port() for _ in range(50)]
    assert {*ports} <= {*allowed}
    assert len({*ports}) == 50, "a port that was given to one server is none for the next"


def test_no_port_is_given_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand, three hundred drawn by chance alone would not differ."""
    (tmp_path / "range").write_text("11240\t65535\n")
    monkeypatch.setattr(process, "_SYSTEMS_OWN", tmp_path / "range")
    monkeypatch.setattr(process, "_given", set())
    assert len({free_port() for _ in range(300)}) == 300


def test_where_the_system_gives_all_ports_one_of_its_own_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "range").write_text("1024\t65000\n")
    monkeypatch.setattr(process, "_SYSTEMS_OWN", tmp_path / "range")
    assert is_free("127.0.0.1", free_port())


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def taken_at_first(host: str, port: int) -> bool:
        asked.append(port)
        return len(asked) == 3

    monkeypatch.setattr(process, "is_free", taken_at_first)
    assert free_port() == asked[2]


# --- HTTP -------------------------------------------------------------------------------------------------------------


class Answers(BaseHTTPRequestHandler):
    """Answers by the route's name."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        route = self.path[1:]
        self.server.seen.append((route, dict(self.headers)))  # type: ignore[attr-defined]
        if route == "endless":
            self._write_for_ever()
            return
        if route == "drop":
            self.connection.close()
            return
        if route == "slow":
            self.server.release.wait()  # type: ignore[attr-defined]
        status, text = {
            "good": (200, '{"a": [1]}'),
            "empty": (200, ""),
            "text": (200, "Cache flushed."),
            "refused": (400, '{"error": {"message": "temperature must not be -1"}}'),
            "message": (400, '{"success": false, "message": "no such tensor"}'),
            "failed": (500, "Internal Server Error"),
            "gateway": (503, "no worker"),
            "short": (200, '{"a": [1'),
            "slow": (200, "{}"),
            "moved": (302, ""),
            "moved-on": (307, ""),
            "deep": (200, "[" * 100_000),
            "digits": (200, "9" * 5000),
            "packed": (200, "no gzip"),
            "long-error": (400, "x" * 10**6),
            "coloured": (400, '{"error": "\\u001b]52;c;aGk=\\u0007 \\ud800"}'),
            "keyless": (401, '{"error": "Unauthorized"}'),
        }[route]
        self.send_response(status)
        if route == "packed":
            self.send_header("Content-Encoding", "gzip")
        if status in (302, 307):
            self.send_header("Location", "/good")
        self.send_header("Content-Length", str(len(text) + (100 if route == "short" else 0)))
        self.end_headers()
        self.wfile.write(text.encode())
        if route == "short":
            self.close_connection = True

    def do_GET(self) -> None:
        self.server.seen.append((self.path[1:], dict(self.headers)))  # type: ignore[attr-defined]
        self.send_error(404)

    def _write_for_ever(self) -> None:
        """Until nobody reads it any more; counts what went out."""
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            while self.server.num_written < 2**32:  # type: ignore[attr-defined]
                self.server.num_written += self.connection.send(bytes(2**20))  # type: ignore[attr-defined]
        self.server.release.set()  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def answering() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.release = threading.Event()
    server.seen, server.num_written = [], 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()  # looks often for its end
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def url(answering: Any) -> str:
    return f"http://127.0.0.1:{answering.server_port}"


def post(url: str, route: str, timeout_s: float = 60.0, is_gateway: bool = False, **connecting: Any) -> object:
    longest = connecting.pop("longest_answer", ANSWER_BYTES)

    async def ask() -> object:
        async with aiohttp.ClientSession(auto_decompress=False) as session:
            connection = ServerConnection(session, url, is_gateway=is_gateway, **connecting)
            return await connection.post(f"/{route}", {"x": 1}, timeout_s=timeout_s, longest_answer=longest)

    return asyncio.run(ask())


def test_answers(url: str) -> None:
    assert post(url, "good") == {"a": [1]}
    assert post(url, "empty") is None
    assert post(url, "text") == "Cache flushed."


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("refused", "/refused answered 400: temperature must not be -1$"),
        ("message", "/message answered 400: no such tensor$"),
        ("failed", "/failed answered 500: Internal Server Error$"),
    ],
)
def test_refusals_are_in_the_servers_words(url: str, route: str, words: str) -> None:
    with pytest.raises(ServerRefusedError, match=words):
        post(url, route)


@pytest.mark.parametrize("route", ["drop", "short", "gateway"])
def test_lost_answers_may_be_asked_for_again(url: str, route: str) -> None:
    with pytest.raises(ServerUnreachableError, match=f"{url}/{route}"):
        post(url, route)


def test_a_routers_errors_are_those_of_reaching_a_worker(url: str) -> None:
    with pytest.raises(ServerUnreachableError, match="/failed answered 500"):
        post(url, "failed", is_gateway=True)
    with pytest.raises(ServerRefusedError, match="/refused answered 400"):
        post(url, "refused", is_gateway=True)


def test_late_answers_may_be_asked_for_again(url: str) -> None:
    with pytest.raises(ServerUnreachableError, match=r"did not answer within 0\.1 s"):
        post(url, "slow", timeout_s=0.1)


def test_an_answer_without_end_is_refused_where_it_must_have_ended(url: str, answering: Any) -> None:
    with pytest.raises(ServerRefusedError, match="/endless gave more than the 1048576 bytes that its answer can have"):
        post(url, "endless", longest_answer=2**20)
    assert answering.release.wait(60), "the connection was closed"
    assert answering.num_written < 2**26, "some megabytes are on their way when it is noticed, and no gigabytes"


def test_a_bound_is_the_last_byte_that_is_read(url: str) -> None:
    assert post(url, "good", longest_answer=len('{"a": [1]}')) == {"a": [1]}
    with pytest.raises(ServerRefusedError, match="more than the 9 bytes"):
        post(url, "good", longest_answer=len('{"a": [1]}') - 1)


@pytest.mark.parametrize("route", ["moved", "moved-on"])
def test_redirections_are_not_followed(url: str, route: str, answering: Any) -> None:
    with pytest.raises(ServerRefusedError, match=f"/{route} answered 30[27]: a redirection, which is not followed"):
        post(url, route)
    assert [seen for seen, _ in answering.seen] == [route]


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ("deep", "/deep gave an answer that cannot be read: maximum recursion"),
        ("digits", "/digits gave an answer that cannot be read: .*4300 digits"),
        ("packed", "/packed answered in 'gzip', which it was not asked for"),
        ("long-error", "/long-error answered 400: x{2000}$"),
        ("coloured", r"/coloured answered 400: \\x1b\]52;c;aGk=\\x07 \\ud800$"),
        ("keyless", r"/keyless answered 401: Unauthorized\. For a server in servers\.urls, servers\.api_key_env must"),
    ],
)
def test_answers_that_would_do_harm(url: str, route: str, words: str) -> None:
    with pytest.raises(ServerRefusedError, match=words):
        post(url, route)


def test_the_key_goes_along_where_there_is_one(url: str, answering: Any) -> None:
    post(url, "good", key="secret")
    post(url, "good")
    (_, with_key), (_, without) = answering.seen
    assert with_key["Authorization"] == "Bearer secret"
    assert "Authorization" not in without
    assert with_key["Accept-Encoding"] == "identity"


def test_nobody_at_home() -> None:
    with pytest.raises(ServerUnreachableError, match="could not be asked"):
        post(f"http://127.0.0.1:{free_port()}", "good")


# --- the thread -------------------------------------------------------------------------------------------------------


def test_coroutines_run_in_the_thread_and_are_cancelled_with_their_caller() -> None:
    loop = EventLoopThread()
    seen: list[str] = []

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        return threading.current_thread().name

    assert loop.run(work(0)) == "servers"

    async def caller() -> None:
        assert await loop.run_here(work(0)) == "servers"
        task = asyncio.ensure_future(loop.run_here(work(600)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(caller())
    rest = loop.submit(work(600))
    loop.stop()
    assert rest.cancelled()
    assert seen  # the last one surely had begun


# --- SGLang -----------------------------------------------------------------------------------------------------------

SPEC = LaunchSpec(
    "python", Path("/models/tiny"), "127.0.0.1", 3000, "bfloat16", "7", tp=2, cpu_cores=((0, 1), (2, 3)), key="the-key"
)


def test_the_command_on_the_cpu() -> None:
    plan = SglangAdapter().launch_plan(replace(SPEC, extra_args=("--more", "1"), max_total_tokens=50))
    assert plan.command[0] == "python"
    assert plan.command[1].endswith("sglang_cpu_launcher.py")
    text = " ".join(plan.command)
    for part in ("--model-path /models/tiny", "--port 3000", "--dtype bfloat16", "--tp 2", "--weight-version 7"):
        assert part in text
    assert "--max-total-tokens 50" in text
    assert text.endswith("--more 1")
    assert plan.environment["SGLANG_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    assert plan.environment["OMP_NUM_THREADS"] == "2"


def test_the_command_on_gpus() -> None:
    spec = replace(SPEC, device="cuda", gpus=("4", "5"), releases_memory=True, reproducible=True)
    plan = SglangAdapter().launch_plan(spec)
    assert plan.command[1].endswith("/sglang_launcher.py")
    assert {"--enable-memory-saver", "--enable-deterministic-inference"} <= set(plan.command)
    assert "--enable-fp32-lm-head" in plan.command, "logits as the actor has them"
    assert "--enable-fp32-lm-head" not in SglangAdapter().launch_plan(replace(spec, dtype="float32")).command
    assert plan.environment["PYTORCH_ALLOC_CONF"] is None, "memory that is released bears no expandable segments"
    assert plan.environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    router = router_plan(spec, ["http://a:1"], 9)
    assert router.command[1].endswith("/sglang_launcher.py")
    assert router.command[2] == "router"
    assert router.environment[KEY_VARIABLE] == "the-key"


@pytest.mark.parametrize("key", ["0a1b", "-x", "--port"])
def test_sglang_takes_any_key_from_its_launcher(tmp_path: Path, key: str) -> None:
    """Also one that looks like an option; the engine itself is not installed here, its parser is Python's."""
    (tmp_path / "sglang_router").mkdir()
    (tmp_path / "sglang_router" / "__init__.py").touch()
    (tmp_path / "sglang_router" / "launch_router.py").write_text(
        "import argparse\n"
        "parser = argparse.ArgumentParser()\n"
        "parser.add_argument('--api-key')\n"
        "print(parser.parse_args().api_key)\n"
    )
    launcher = Path(server_guard.__file__).with_name("sglang_launcher.py")
    result = subprocess.run(
        [sys.executable, launcher, "router"],
        env={**os.environ, "PYTHONPATH": str(tmp_path), KEY_VARIABLE: key},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout == f"{key}\n", result.stderr


@pytest.mark.parametrize("adapter", [SglangAdapter(), VllmAdapter()])
def test_the_key_is_in_the_environment_and_in_no_text(adapter: ServerAdapter) -> None:
    for spec in (SPEC, replace(SPEC, device="cuda", gpus=("4", "5"))):
        plan = adapter.launch_plan(replace(spec, max_total_tokens=None))
        assert plan.environment[KEY_VARIABLE] == "the-key"
        for text in (*plan.command, repr(plan), repr(spec)):
            assert "the-key" not in text


def test_seeds_on_the_cpu_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"servers\.reproducible=true: SGLang draws tokens from their request's seed on"
    ):
        SglangAdapter().launch_plan(replace(SPEC, reproducible=True))


def answer(**changes: object) -> dict[str, object]:
    meta = {
        "finish_reason": {"type": "length"},
        "output_token_logprobs": [[-1.0, 5, None], [-2.0, 6, None]],
        "weight_versions": [{"version": "3", "start": 0, "end": 1}, {"version": "4", "start": 1, "end": 2}],
        "cached_tokens": 9,
    }
    return {"output_ids": [5, 6], "meta_info": meta | changes}


def test_an_answer_becomes_a_completion() -> None:
    completion = _completion(answer(), "http://s")
    assert completion.token_ids == [5, 6]
    assert completion.log_probs == [-1.0, -2.0]
    assert completion.version_spans == [("3", 0, 1), ("4", 1, 2)]
    assert (completion.finish_reason, completion.num_cached_tokens) == ("length", 9)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_token_logprobs": [[-1.0, 5, None]]},
        {"output_token_logprobs": [[-1.0, 5, None], [-2.0, 7, None]]},
        {"weight_versions": []},
        {"weight_versions": [{"version": "3", "start": 0, "end": 1}]},
        {"weight_versions": [{"version": "3", "start": 1, "end": 2}]},
        {"finish_reason": None},
        {"finish_reason": {"type": "oops"}},
        {"output_token_logprobs": [["-1.0", 5, None], [-2.0, 6, None]]},
        {"output_token_logprobs": [[True, 5, None], [-2.0, 6, None]]},
    ],
)
def test_an_answer_whose_parts_do_not_fit_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ServerRefusedError, match="do not belong together"):
        _completion(answer(**changes), "http://s")


@pytest.mark.parametrize(
    "changes", [{"weight_versions": [{"version": "3"}]}, {"output_token_logprobs": [5]}, {"finish_reason": "stop"}]
)
def test_an_answer_of_another_form_is_a_refusal_and_no_traceback(changes: dict[str, object]) -> None:
    words = "http://s gave an answer of a form that is not known here"
    with pytest.raises(ServerRefusedError, match=words), reading("http://s"):
        _completion(answer(**changes), "http://s")


def test_the_last_words_are_the_errors_in_a_log() -> None:
    log = "INFO fine\nTraceback (most recent call last):\n  File x\nRuntimeError: Not enough memory\nReceived sigquit\n"
    assert SglangAdapter().reason_of_exit(log) == "RuntimeError: Not enough memory"
    assert SglangAdapter().reason_of_exit("one\ntwo\n") == "one\ntwo"


# --- set-up -----------------------------------------------------------------------------------------------------------


def test_a_pool_whose_server_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    """The real path through process, log and error, with a Python that has no SGLang."""
    loop = EventLoopThread()
    spec = replace(SPEC, python=sys.executable, port=free_port(), device="cuda", gpus=("0",))
    pool = ServerPool(SglangAdapter(), [spec], ServersSection(start_timeout_s=60.0), log_folder=tmp_path)
    words = r"^sglang-0 exited with 1 \(log: .*sglang-0\.log\)\. It reported:\n.*No module named '(uvicorn|sglang)'$"
    with pytest.raises(ServerError, match=words):
        loop.run(pool.start())
    loop.stop()


STRANGER = """
    import http.server, json, os, sys
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            is_known = "open" in sys.argv or self.headers["Authorization"] == "Bearer " + os.environ["THE_KEY"]
            self.send_response(200 if is_known else 401)
            self.end_headers()
            self.wfile.write(json.dumps({"model_path": "m", "weight_version": "7"}).encode())
        def log_message(self, *words): pass
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.mark.parametrize("kind", ["guarded", "open"])
def test_a_server_that_answers_without_the_key_is_refused(kind: str, tmp_path: Path) -> None:
    class Adapter(SglangAdapter):
        def launch_plan(self, spec: LaunchSpec) -> LaunchPlan:
            command = (sys.executable, "-c", textwrap.dedent(STRANGER), str(spec.port), kind)
            return LaunchPlan(command, {"THE_KEY": spec.key})

    loop = EventLoopThread()
    spec = replace(SPEC, port=free_port())
    pool = ServerPool(Adapter(), [spec], ServersSection(start_timeout_s=60.0), log_folder=tmp_path)
    if kind == "open":
        with pytest.raises(ServerError, match="sglang-0 answers requests without the run's key"):
            loop.run(pool.start())
    else:
        loop.run(pool.start())
        loop.run(pool.close())
    loop.stop()


def config_with(*overrides: str) -> Config:
    return load_config(None, [*SOUND, "rollout.engine=sglang", "servers.device=cpu", *overrides])


def test_servers_of_a_run_have_a_random_key_and_others_that_of_their_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [launch_specs(config_with("servers.num_per_node=2"), "cpu", [])[0].key for _ in range(2)]
    assert len(set(keys)) == 2
    assert min(map(len, keys)) >= 40
    first, second = launch_specs(config_with("servers.num_per_node=2"), "cpu", [])
    assert first.key == second.key, "of a pool"
    urls = ["http://127.0.0.1:3000"]
    assert launch_specs(config_with(f"servers.urls={urls}"), "cpu", urls)[0].key == ""
    config = config_with(f"servers.urls={urls}", "servers.api_key_env=THEIR_KEY")
    for value, words in ((None, "is not set or empty"), ("", "is not set or empty"), ("a b\n", "something other than")):
        monkeypatch.delenv("THEIR_KEY", raising=False)
        if value is not None:
            monkeypatch.setenv("THEIR_KEY", value)
        with pytest.raises(ValueError, match=rf"servers\.api_key_env=THEIR_KEY: .*{words}") as refused:
            launch_specs(config, "cpu", urls)
        assert "a b" not in str(refused.value)
    monkeypatch.setenv("THEIR_KEY", "theirs")
    assert launch_specs(config, "cpu", urls)[0].key == "theirs"


def test_keys_in_the_open_are_warned_of() -> None:
    def warnings(*overrides: str) -> list[str]:
        return [words for words in warnings_for(config_with(*overrides)) if "api_key_env" in words]

    assert warnings() == []
    (without,) = warnings("servers.urls=[http://127.0.0.1:1]")
    assert "SGLang unpickles what is posted to it" in without
    assert warnings("servers.urls=[http://127.0.0.1:1,http://localhost:2]", "servers.api_key_env=K") == []
    (plain,) = warnings("servers.urls=[http://127.0.0.1:1,http://node7:2]", "servers.api_key_env=K")
    assert "goes to http://node7:2 as plain text" in plain


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 4, 5, 6})
    assert shared_cores(2) == [(2, 3), (4, 5)]
    assert shared_cores(6) == [(2,), (3,), (4,), (5,), (6,), (2,)]


SOUND = ["model.path=m", "data.train.a.kind=chain_arithmetic", "data.train.a.verifier=chain_arithmetic"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["servers.urls=[https://a:1]"], "servers.urls: 'https://a:1' is not of the form http://host:port"),
        (["servers.router=true", "rollout.engine=vllm"], "sglang-router speaks to SGLang only"),
        (["servers.router=true", "servers.urls=[http://a:1]"], "Remove servers.urls, or it"),
        (["servers.weight_sync=disk", "servers.keep_snapshot=false"], "Set keep_snapshot=true"),
        (["servers.weight_sync=distributed", "servers.placement=colocated"], "Set weight_sync=tensor"),
        (["servers.gpus=[1]", "servers.tp=2"], r"servers.gpus=\[1\]: .* take 2"),
        (["servers.gpus=[1,1]", "servers.tp=2"], "must be different numbers"),
        (["servers.device=cuda"], "servers.gpus is empty: placement=dedicated needs GPUs of its own"),
        (["servers.device=cuda", "servers.gpus=[1]"], "weight_sync=tensor: .* means GPUs that no rank of the trainer"),
        (
            ["servers.device=cuda", "servers.placement=colocated", "servers.urls=[http://a:1]"],
            "servers.gpus is empty: weight_sync=tensor .* Name them in the servers' order",
        ),
        (["servers.api_key_env=K"], "api_key_env: is for the servers in servers.urls, and that is empty"),
        (["servers.urls=[http://a:1]", "servers.api_key_env=sk_12"], r"not the name of .* \(its value is not shown"),
        (["servers.urls=[http://a:1]", "rollout.engine=vllm"], "servers.api_key_env=null: the worker extension of a"),
        (["servers.extra_args=[--api-key,x]"], r"extra_args: --api-key would replace the random key .* servers.urls"),
        (["servers.extra_args=[--admin-api-key=x]"], "extra_args: --admin-api-key would replace"),
        (["servers.extra_args=[--hf-token, x]"], "value of --hf-token is a secret.*command line.*HF_TOKEN"),
        (["servers.extra_args=[--ssl-keyfile-password=x]"], "value of --ssl-keyfile-password is a secret"),
        (["servers.extra_args=[--config, '{k: ${oc.env:MY_STORE_SECRET}}']"], "MY_STORE_SECRET is a secret, by its"),
        (["servers.placement=shared"], "must be one of dedicated, colocated"),
        (["servers.base_port=80"], "must be between 1024 and 65535"),
    ],
)
def test_settings_that_contradict_each_other(
    overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_STORE_SECRET", "geheim-123")
    with pytest.raises(ConfigError, match=message) as refused:
        validate(load_config(None, [*SOUND, "rollout.engine=sglang", *overrides]))
    assert "geheim" not in str(refused.value)


def test_sound_settings() -> None:
    for engine in ("sglang", "vllm", "in_process"):
        validate(load_config(None, [*SOUND, f"rollout.engine={engine}"]))
        about_tokens = "servers.extra_args=[--num-speculative-tokens,3,--stop-token-ids,1,--ssl-keyfile=k,a-password]"
        validate(load_config(None, [*SOUND, f"rollout.engine={engine}", about_tokens]))
        on_gpus = [*SOUND, f"rollout.engine={engine}", "servers.device=cuda"]
        validate(load_config(None, [*on_gpus, "servers.placement=colocated"]))
        validate(load_config(None, [*on_gpus, "servers.gpus=[1]", "servers.weight_sync=distributed"]))


# --- requests ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_ids": ()}, "the prompt is empty"),
        ({"prompt_ids": (3, 10)}, r"prompt_ids reach from 3 to 10; the model has tokens 0 … 9"),
        ({"prefix": (-1,)}, "prefix reach from -1"),
        ({"sampling": SamplingParams(4, temperature=-0.1)}, "temperature must be at least 0"),
        ({"sampling": SamplingParams(4, top_p=1.1)}, "top_p must lie in"),
        ({"sampling": SamplingParams(1), "prefix": (3,)}, "max_tokens=1 leaves nothing after a prefix of 1"),
        ({"prefix": (2,)}, "its prefix ends in stop token 2"),
    ],
)
def test_requests_that_no_engine_could_generate(changes: dict[str, object], message: str) -> None:
    request = GenerationRequest("a/1", 0, 0, (3, 4), SamplingParams(4), seed=1)
    check_request(request, 10, {2})
    with pytest.raises(ValueError, match=f"sample 'a/1': .*{message}"):
        check_request(replace(request, **changes), 10, {2})  # type: ignore[arg-type]


SETTINGS = EngineSettings(vocab_size=10, stop_token_ids=frozenset({1}), score_timeout_s=1.0, canary_tolerance=1.0)


# --- ranks without servers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem_elsewhere", ["", "sglang-0 said no"])
def test_a_rank_without_servers_drains_and_hears_of_failures_elsewhere(problem_elsewhere: str) -> None:
    said: list[str] = []

    def agree(problem: str) -> list[str]:
        said.append(problem)
        return [problem_elsewhere, problem]

    engine = ServerEngine(None, SETTINGS, agree=agree, share=None)
    stream = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    if problem_elsewhere:
        with pytest.raises(ServerError, match=r"^sglang-0 said no$"):
            engine.update_weights(stream, 1)
    else:
        engine.update_weights(stream, 1)
    assert list(stream) == []
    assert said == [""]
    assert engine.metrics() == {}
    with pytest.raises(RuntimeError, match="this rank owns no servers"):
        asyncio.run(engine.generate(GenerationRequest("a", 0, 0, (3,), SamplingParams(4), seed=1)))
    engine.close()


def test_an_error_here_is_told_to_everyone_and_the_stream_still_drained() -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.zeros(1)
        raise OSError("rank 3 is gone")

    said: list[str] = []
    engine = ServerEngine(None, SETTINGS, agree=lambda problem: (said.append(problem), [problem])[1], share=None)
    with pytest.raises(ServerError, match="rank 3 is gone"):
        engine.update_weights(broken(), 1)
    assert said == ["rank 3 is gone"]
