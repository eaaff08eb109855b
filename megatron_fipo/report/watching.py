"""Serves the report of runs that go on, on this machine alone: the page, and its data for as long as it stays open.

Read-only, and bound to 127.0.0.1; an ssh tunnel brings it elsewhere. A request must name this machine as its host:
otherwise a page of the internet could have its own name resolved to 127.0.0.1, and read what is served here.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_fipo.analysis.of_run import Analysis, analyse_run
from megatron_fipo.report.page_file import Page, policy_text, safe_json
from megatron_fipo.report.report_data import Report, make_report
from megatron_fipo.report.run_data import read_run
from megatron_fipo.system.text_hygiene import clean_text

ADDRESS = "127.0.0.1"
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost)(?::\d{1,5})?", re.IGNORECASE)
"""Any port: that of the tunnel's other end is another one."""
_READ = ("metrics.jsonl", "config.yaml", "evaluation/*", "traces/*.parquet", "samples/*.jsonl")
"""The files of a run that its report is made of."""
_SOCKET_TIMEOUT_S = 30


@dataclass(frozen=True)
class Served:
    """What is served as long as no file changes.

    Attributes:
        tag: stands for the state of the files.
        report: the report.
    """

    tag: str
    report: Report


class LiveReport:
    """The report of some runs, made anew when one of their files has changed."""

    def __init__(self, folders: Sequence[Path], max_trace_tokens: int, page: Page) -> None:
        """
        Args:
            folders: of runs; one that has no numbers yet is shown without.
            max_trace_tokens: tokens of traces to show of all runs together.
            page: the parts of the page.
        """
        self._folders, self._max_trace_tokens, self._page = folders, max_trace_tokens, page
        self._lock = threading.Lock()
        self._served: Served | None = None
        self._analyses: Sequence[Analysis | None] = [None] * len(folders)

    def newest(self) -> Served:
        """The report of the files as they are. Several threads may ask.

        Raises:
            ValueError: if a file is damaged, or a run's folder is gone.
        """
        with self._lock:  # one thread reads; the others find what it has made
            tag = self.tag()
            if self._served is None or self._served.tag != tag:
                runs = [read_run(folder) for folder in self._folders]
                analyses = [
                    analyse_run(folder, earlier) for folder, earlier in zip(self._folders, self._analyses, strict=True)
                ]
                self._analyses = analyses  # files that stay as they are are not analysed again
                self._served = Served(tag, make_report(runs, analyses, self._max_trace_tokens, is_live=True))
            return self._served

    def tag(self) -> str:
        """What changes when a file of a run appears, goes or changes."""
        state = hashlib.blake2b(digest_size=16)
        for path, seconds, size in sorted(self._files()):
            state.update(repr((path, seconds, size)).encode("utf-8", "backslashreplace"))
        return f'"{state.hexdigest()}"'

    def html(self, report: Report) -> str:
        """The page of a report."""
        return self._page.html(report)

    def _files(self) -> Iterator[tuple[str, int, int]]:
        for folder in self._folders:
            for pattern in _READ:
                for path in folder.glob(pattern):
                    try:
                        found = path.stat()
                    except FileNotFoundError:  # replaced between two looks
                        continue
                    yield str(path), found.st_mtime_ns, found.st_size


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, live: LiveReport) -> None:
        self.live = live
        super().__init__((ADDRESS, port), _Handler)


def open_server(port: int, live: LiveReport) -> ThreadingHTTPServer:
    """A server on 127.0.0.1 that is bound and waits for `serve_forever`.

    Args:
        port: 0 takes a free one; `server_address` says which.

    Raises:
        ValueError: if the port is taken or may not be used.
    """
    try:
        return _Server(port, live)
    except OSError as error:
        raise ValueError(
            f"--port={port} cannot be served on {ADDRESS}: {error.strerror or error}. Leave --port out for a free one."
        ) from error


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of the page and of its data; refuses all else."""

    server: _Server
    timeout = _SOCKET_TIMEOUT_S
    server_version, sys_version = "megatron_fipo", ""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing: a page that asks every few seconds would fill the terminal."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Errors in plain text, without what was asked for."""
        status = HTTPStatus(code)
        if status == HTTPStatus.NOT_IMPLEMENTED:  # what http.server says where a handler lacks a method
            status = HTTPStatus.METHOD_NOT_ALLOWED
        self._refuse(status, status.phrase)

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host", [])
        if len(hosts) != 1 or not _HOST.fullmatch(hosts[0].strip()):
            self._refuse(HTTPStatus.FORBIDDEN, "This server answers to 127.0.0.1 and localhost alone.")
        elif self.path == "/":
            self._send_newest(is_page=True)
        elif self.path == "/data.json":
            self._send_newest(is_page=False)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There are / and /data.json.")

    def _send_newest(self, *, is_page: bool) -> None:
        """The page, or its data unless the browser has them."""
        live = self.server.live
        known = [tag.strip().removeprefix("W/") for tag in self.headers.get("If-None-Match", "").split(",")]
        try:
            if not is_page and (tag := live.tag()) in known:
                self._send(HTTPStatus.NOT_MODIFIED, None, b"", tag)
                return
            newest = live.newest()
        except (ValueError, OSError) as error:  # damaged, or replaced as it was read: the page asks again
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, clean_text(str(error)))
            return
        if is_page:
            self._send(HTTPStatus.OK, "text/html", live.html(newest.report).encode("utf-8", "backslashreplace"))
        else:
            self._send(HTTPStatus.OK, "application/json", safe_json(newest.report.data).encode(), newest.tag)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._send(status, "text/plain", f"{text}\n".encode("utf-8", "backslashreplace"))

    def _send(self, status: HTTPStatus, kind: str | None, body: bytes, tag: str | None = None) -> None:
        self.send_response(status)
        if kind is not None:  # "not modified" has no body; a length of 0 would be that of the data that the client has
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        # With a tag the browser keeps the data, and asks each time whether they still hold.
        self.send_header("Cache-Control", "no-store" if tag is None else "private, no-cache")
        if tag is not None:
            self.send_header("ETag", tag)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Content-Security-Policy", f"{policy_text(is_live=True)}; frame-ancestors 'none'")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
