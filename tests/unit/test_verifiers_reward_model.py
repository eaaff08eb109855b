"""Reward models, against a real HTTP server; and verifiers that are objects."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import require_verifier_name
from megatron_fipo.verifiers import reward_model
from megatron_fipo.verifiers.judging import judge
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.registry import load_verifier
from megatron_fipo.verifiers.reward_model import RewardModel, RewardModelError
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob


@dataclass
class Server:
    """A server that answers its n-th request with the n-th answer, and all further requests with the last."""

    url: str
    answers: list[tuple[int, bytes]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    content_types: list[str] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    """Headers of every answer, which replace usual ones of the same name."""
    silence: threading.Event = field(default_factory=threading.Event)
    """The server answers while this is set; while it is cleared, every request waits."""


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server("")
    state.silence.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            state.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            state.content_types.append(self.headers["Content-Type"])
            status, body = state.answers[min(len(state.requests), len(state.answers)) - 1]
            state.silence.wait(60)
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **state.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            state.requests.append({"method": "GET"})
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"score": 1}')

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))  # looks often for its end
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/score"
    yield state
    state.silence.set()
    http.shutdown()
    thread.join()
    http.server_close()


def ask(server: Server, timeout_s: float = 2.0) -> Verdict:
    job = VerifierJob(server.url, "Ré: 4", {"answer": 4}, prompt_text="2+2?")
    return RewardModel(server.url).judge(job, timeout_s)


def test_what_is_asked_and_what_is_answered(server: Server) -> None:
    server.answers = [(200, b'{"score": 0.25, "answer": "4", "model": "ignored"}'), (200, b'{"score": 1}')]
    assert ask(server) == Verdict(0.25, "4")
    assert ask(server) == Verdict(1.0)
    assert server.requests == [{"prompt": "2+2?", "response": "Ré: 4", "reference": {"answer": 4}}] * 2
    assert server.content_types[0] == "application/json; charset=utf-8"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_passing_failures_are_tried_again(server: Server, status: int) -> None:
    server.answers = [(status, b""), (status, b""), (200, b'{"score": 1.0}')]
    assert ask(server).correct
    assert len(server.requests) == 3


def test_lasting_failures_are_errors(server: Server) -> None:
    server.answers = [(503, b"")]
    with pytest.raises(RewardModelError, match=r"score did not answer \(3 requests\): status 503 Service Unavailable"):
        ask(server)
    assert len(server.requests) == reward_model.NUM_ATTEMPTS


def test_refusals_are_not_tried_again(server: Server) -> None:
    server.answers = [(404, b"")]
    with pytest.raises(RewardModelError, match=r"\(1 requests\): status 404 Not Found"):
        ask(server)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(server: Server, status: int) -> None:
    server.answers = [(status, b"")]
    server.headers = {"Location": f"{server.url}/elsewhere?key=secret"}
    with pytest.raises(RewardModelError, match=rf"\(1 requests\): status {status} ") as raised:
        ask(server)
    assert f"a redirect to {server.url}/elsewhere?…, which is not followed" in str(raised.value)
    assert len(server.requests) == 1, "nothing was asked of the other address"


def test_an_answer_cut_short_is_none(server: Server) -> None:
    server.answers = [(200, b'{"score": 1}')]
    server.headers = {"Content-Length": "1000", "Connection": "close"}
    with pytest.raises(RewardModelError, match=r"\(3 requests\): the answer was cut short: 988 of its bytes"):
        ask(server)
    server.headers = {}
    assert ask(server).correct


def test_another_status_of_success_is_an_error(server: Server) -> None:
    server.answers = [(202, b'{"score": 1}')]
    with pytest.raises(RewardModelError, match="answered with status 202, not 200"):
        ask(server)


def test_no_message_shows_what_may_be_a_key(server: Server) -> None:
    server.answers = [(404, b""), (200, b"no"), (200, b'{"score": 1, "answer": "\\ud800"}')]
    url = f"{server.url}?key=secret"
    for _ in range(2):
        with pytest.raises(RewardModelError, match=r"score\?… ") as raised:
            RewardModel(url).judge(VerifierJob(url, "4", None), 2.0)
        assert "secret" not in str(raised.value)
    assert judge(VerifierJob(url, "4", None), 2.0) == Verdict(1.0, "\\ud800")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"ok", "which is not JSON"),
        (b"\xff", "which is not JSON"),
        (b"[1.0]", r"an object with a score in \[0, 1\]"),
        (b"{}", "an object with a score"),
        (b'{"score": "1"}', "an object with a score"),
        (b'{"score": true}', "an object with a score"),
        (b'{"score": 1.5}', "an object with a score"),
        (b'{"score": NaN}', "an object with a score"),
        (b'{"score": -3.2}', "an object with a score"),
        (b'{"score": 1, "x": "' + b"x" * 2**20 + b'"}', "more than 1048576 bytes"),
    ],
)
def test_answers_that_say_nothing_are_errors(server: Server, body: bytes, message: str) -> None:
    server.answers = [(200, body)]
    with pytest.raises(RewardModelError, match=message):
        ask(server)
    assert len(server.requests) == 1


def test_silence_and_nobody_there_are_errors_within_the_time(server: Server) -> None:
    server.answers = [(200, b'{"score": 1.0}')]
    server.silence.clear()
    with pytest.raises(RewardModelError, match=r"\(3 requests\): timed out"):
        ask(server, timeout_s=0.4)
    with pytest.raises(RewardModelError, match=r"\(3 requests\): .*Connection refused"):
        RewardModel("http://127.0.0.1:9/score").judge(VerifierJob("", "", ""), 0.4)


def test_in_the_pool_errors_are_no_wrong_answers(server: Server) -> None:
    server.answers = [(200, b'{"score": 1.0}'), (400, b""), (200, b'{"score": 0.0}')]
    jobs = [VerifierJob(server.url, text, None, prompt_text="p") for text in "abc"]
    with VerifierPool(timeout_s=30.0, verifiers=[server.url]) as pool:
        verdicts = pool.judge_all(jobs)
    assert [verdict.correct for verdict in verdicts] == [True, False, False]
    assert [bool(verdict.error) for verdict in verdicts] == [False, True, False]
    assert "status 400" in verdicts[1].error
    assert [request["response"] for request in server.requests] == list("abc")


@pytest.mark.parametrize("name", ["http://host:8000/score", "https://host/a/b?c=d"])
def test_urls_are_verifiers(name: str) -> None:
    require_verifier_name(name)
    assert isinstance(load_verifier(name), RewardModel)


@pytest.mark.parametrize("name", ["http:///score", "ftp://host/", "http://", "http:/host", "http://ho st/"])
def test_what_is_no_url(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*http://host:port/path"):
        require_verifier_name(name)


# ------------------------------------------------------------------------------------------------ objects that judge

OBJECTS = """
from megatron_fipo.verifiers.verdict import JobVerifier, Verdict

class Judge(JobVerifier):
    def __init__(self, ready):
        self.ready = ready
    def check_ready(self):
        if not self.ready:
            raise RuntimeError("this judge needs a wig")
    def judge(self, job, timeout_s):
        return Verdict(float(job.prompt_text == job.response_text), str(timeout_s))

ready, unready = Judge(True), Judge(False)
"""


@pytest.fixture
def objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    (tmp_path / "objects_that_judge.py").write_text(OBJECTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "objects_that_judge:{}".format


def test_an_object_of_ones_own_sees_prompt_and_time(objects: Callable[[str], str]) -> None:
    name = objects("ready")
    with VerifierPool(timeout_s=7.5, verifiers=[name]) as pool:
        verdicts = pool.judge_all([VerifierJob(name, "a", None, prompt_text=prompt) for prompt in "ab"])
    assert verdicts == [Verdict(1.0, "7.5"), Verdict(0.0, "7.5")]


def test_an_object_that_is_not_ready_stops_the_run(objects: Callable[[str], str]) -> None:
    name = objects("unready")
    with VerifierPool(verifiers=[name]) as pool, pytest.raises(RuntimeError, match="this judge needs a wig"):
        pool.judge_all([VerifierJob(name, "a", None)])
