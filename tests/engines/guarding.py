"""What a stranger on the host, or a web page in a browser there, gets of a server that a run started: nothing."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from tests.engines.serving import KEY, Serving

JSON = {"Content-Type": "application/json"}
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
FROM_A_PAGE = {"Content-Type": "text/plain", "Origin": "http://evil.example", "Host": "evil.example"}


def ask(url: str, route: str, body: Any = None, headers: Mapping[str, str] = {}) -> tuple[int, str]:
    """Status and answer; a GET where there is no body."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    try:
        connection.request(
            "GET" if body is None else "POST", route, json.dumps(body) if body is not None else None, headers
        )
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


def expect_strangers_refused(url: str, gets: Sequence[str], posts: Sequence[str]) -> None:
    """On every route; and with the key too where a browser would send it."""
    for route in gets:
        assert ask(url, route)[0] == 401, route
        assert ask(url, route, headers=WITH_KEY)[0] == 200, route
    for route in posts:
        assert ask(url, route, {}, JSON)[0] == 401, route
        assert ask(url, route, {}, JSON | {"Authorization": f"Bearer {KEY[:-1]}"})[0] == 401, route
        assert ask(url, route, {}, FROM_A_PAGE)[0] == 403, route
        assert ask(url, route, {}, JSON | WITH_KEY | {"Origin": "http://evil.example"})[0] == 403, route
        assert ask(url, route, {}, JSON | WITH_KEY | {"Host": "evil.example"})[0] == 403, route
        assert ask(url, route, {}, WITH_KEY | {"Content-Type": "text/plain"})[0] == 415, route


def expect_key_nowhere(serving: Serving, folder: Path) -> None:
    """Neither on a command line nor in a file that the servers wrote."""
    for process in psutil.process_iter():
        try:
            assert KEY not in " ".join(process.cmdline()), process.name()
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    logs = [server.log for server in serving.pool.servers if server.log is not None]
    assert logs
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert set(logs) <= set(files)
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []
