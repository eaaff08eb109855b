"""The page of runs that go on: what is served, to whom, and what is not."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_fipo.report import page_file, watch_command, watching
from megatron_fipo.report.watching import LiveReport, open_server
from megatron_fipo.traces.files import write_trace
from tests.unit.report_runs import training_lines, write_run
from tests.unit.test_report_credit import traced
from tests.unit.test_report_page import PAGE, Elements


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", training_lines(reward__mean=[0.1, 0.2]))


@pytest.fixture
def server(folder: Path) -> Iterator[ThreadingHTTPServer]:
    with open_server(0, LiveReport([folder], 100, PAGE)) as opened:
        thread = threading.Thread(target=opened.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


class Answer:
    """What came back."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status, self.body = response.status, response.read().decode()
        self.headers = {name.lower(): value for name, value in response.getheaders()}


def ask(server: ThreadingHTTPServer, path: str, method: str = "GET", **headers: str) -> Answer:
    """A request as a browser makes it; underscores of header names are dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        return Answer(connection.getresponse())
    finally:
        connection.close()


def add_step(folder: Path, step: int, reward: float) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward/mean": reward}) + "\n")


def test_the_page_is_live(server: ThreadingHTTPServer) -> None:
    answer = ask(server, "/")
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    data = Elements(answer.body).named("report-data")
    assert data["is_live"] is True
    assert data["runs"][0]["metrics"]["reward/mean"] == [0.1, 0.2]
    assert "connect-src 'self'" in answer.body


def test_data_follow_the_run(server: ThreadingHTTPServer, folder: Path) -> None:
    first = ask(server, "/data.json")
    assert (first.status, first.headers["content-type"]) == (200, "application/json; charset=utf-8")
    assert json.loads(first.body)["runs"][0]["steps"] == [0, 1]
    tag = first.headers["etag"]
    same = ask(server, "/data.json", If_None_Match=tag)
    assert (same.status, same.body, same.headers["etag"]) == (304, "", tag)
    assert ask(server, "/data.json", If_None_Match=f'"x", W/{tag}').status == 304
    add_step(folder, 2, 0.7)
    newer = ask(server, "/data.json", If_None_Match=tag)
    assert newer.status == 200
    assert newer.headers["etag"] != tag
    assert json.loads(newer.body)["runs"][0]["metrics"]["reward/mean"] == [0.1, 0.2, 0.7]
    assert json.loads(ask(server, "/data.json").body)["runs"][0]["steps"] == [0, 1, 2]


def test_not_modified_has_no_body_and_the_client_goes_on(server: ThreadingHTTPServer) -> None:
    """As a browser asks: it keeps the connection if it may, and takes each answer for as long as its headers say."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
    keep = {"Connection": "keep-alive"}
    try:
        connection.request("GET", "/data.json", headers=keep)
        whole = Answer(connection.getresponse())
        for _ in range(3):
            connection.request("GET", "/data.json", headers=keep | {"If-None-Match": whole.headers["etag"]})
            same = Answer(connection.getresponse())
            assert (same.status, same.body, same.headers["etag"]) == (304, "", whole.headers["etag"])
            assert not {"content-length", "content-type", "transfer-encoding"} & set(same.headers)
            assert same.headers["connection"] == "close"
        connection.request("GET", "/data.json", headers=keep)
        assert Answer(connection.getresponse()).body == whole.body
    finally:
        connection.close()


def test_nothing_follows_the_headers_of_not_modified(server: ThreadingHTTPServer) -> None:
    tag = ask(server, "/data.json").headers["etag"]
    request = f"GET /data.json HTTP/1.1\r\nHost: localhost\r\nIf-None-Match: {tag}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=20) as asking:
        asking.sendall(request.encode())
        answer = b"".join(iter(lambda: asking.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.0 304 ")
    assert answer.endswith(b"\r\n\r\n")
    assert answer.count(b"\r\n\r\n") == 1


def test_a_step_that_is_being_written_is_not_served(server: ThreadingHTTPServer, folder: Path) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert json.loads(ask(server, "/data.json").body)["runs"][0]["steps"] == [0, 1]


def test_new_traces_and_evaluations_change_the_tag(folder: Path) -> None:
    live = LiveReport([folder], 100, PAGE)
    tags = [live.tag()]
    write_trace(folder / "traces", [traced(3)], {})
    tags.append(live.tag())
    (folder / "evaluation").mkdir()
    (folder / "evaluation/before.json").write_text("{}")
    tags.append(live.tag())
    os.utime(folder / "config.yaml", ns=(1, 1))
    tags.append(live.tag())
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints/x").write_text("nothing that is shown")
    assert live.tag() == tags[-1]
    assert len(set(tags)) == 4


def test_files_are_read_once_for_each_change(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    monkeypatch.setattr(watching, "read_run", lambda place: reads.append(place) or _read(place))
    live = LiveReport([folder], 100, PAGE)
    first = live.newest()
    assert live.newest() is first
    add_step(folder, 2, 0.5)
    assert live.newest() is not first
    assert len(reads) == 2


_read = watching.read_run


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:8888", "127.0.0.1:1", "LOCALHOST:80"])
def test_the_other_end_of_a_tunnel_is_answered(server: ThreadingHTTPServer, host: str) -> None:
    assert ask(server, "/data.json", Host=host).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "0.0.0.0",
        "127.0.0.1:x",
    ],
)
@pytest.mark.parametrize("path", ["/", "/data.json", "/other"])
def test_another_name_for_this_machine_is_refused(server: ThreadingHTTPServer, host: str, path: str) -> None:
    answer = ask(server, path, Host=host)
    assert answer.status == 403
    assert "reward" not in answer.body


@pytest.mark.parametrize(
    "path",
    [
        "/config.yaml",
        "/..",
        "/../run/config.yaml",
        "/%2e%2e/config.yaml",
        "/data.json/",
        "/data.json?x",
        "/evaluation/",
    ],
)
def test_there_is_nothing_else(server: ThreadingHTTPServer, path: str) -> None:
    answer = ask(server, path)
    assert answer.status == 404
    assert answer.body == "There are / and /data.json.\n"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FOO"])
def test_it_is_read_only(server: ThreadingHTTPServer, method: str) -> None:
    answer = ask(server, "/", method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET, HEAD"


def test_head_has_no_body(server: ThreadingHTTPServer) -> None:
    whole, head = ask(server, "/data.json"), ask(server, "/data.json", "HEAD")
    assert head.body == ""
    assert head.headers["content-length"] == str(len(whole.body)) == whole.headers["content-length"]


@pytest.mark.parametrize(
    ("path", "caching"), [("/", "no-store"), ("/data.json", "private, no-cache"), ("/x", "no-store")]
)
def test_headers_keep_it_to_itself(server: ThreadingHTTPServer, path: str, caching: str) -> None:
    headers = ask(server, path).headers
    assert headers["cache-control"] == caching
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers
    assert not re.search("python", headers["server"], re.IGNORECASE)


def test_a_damaged_file_is_said_and_mended(server: ThreadingHTTPServer, folder: Path) -> None:
    content = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("no metrics\n" + content)
    answer = ask(server, "/data.json")
    assert answer.status == 503
    assert "line 1 is no line of metrics" in answer.body
    (folder / "metrics.jsonl").write_text(content)
    assert ask(server, "/data.json").status == 200


def test_a_run_that_has_just_begun_is_served(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "new", [])
    (folder / "metrics.jsonl").unlink()
    other = write_run(tmp_path / "other", training_lines(reward__mean=[0.1]), {"run.seed": 1})
    runs = LiveReport([folder, other], 100, PAGE).newest().report.data["runs"]
    assert [run["verdict"][0]["title"] for run in runs] == ["No step is finished", "Unfinished"]


def test_it_is_bound_to_this_machine_alone(server: ThreadingHTTPServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(ValueError, match=r"--port=\d+ cannot be served.*Leave --port out"):
        open_server(server.server_address[1], server.live)  # type: ignore[attr-defined]


def test_the_command_says_where_it_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: ThreadingHTTPServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(page_file, "installed_page", lambda: PAGE)
    monkeypatch.setattr(ThreadingHTTPServer, "serve_forever", interrupted)
    parser = argparse.ArgumentParser()
    watch_command.add_arguments(parser)
    assert watch_command.run(parser.parse_args([str(folder)])) == 0
    said = capsys.readouterr().out
    port = re.match(r"http://127\.0\.0\.1:(\d+)/ shows ", said)
    assert port is not None
    assert f"ssh -N -L {port[1]}:127.0.0.1:{port[1]} " in said
    with pytest.raises(ValueError, match="is no folder here"):
        watch_command.run(parser.parse_args([str(folder / "missing")]))
    with pytest.raises(SystemExit):
        parser.parse_args([str(folder), "--port", "65536"])
