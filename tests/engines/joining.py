"""Servers that `megatron-fipo serve` starts for a run: how they join it, what they are asked, and how they leave."""

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
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megatron_fipo.actor.actor import Actor
from megatron_fipo.rollout.servers.sglang.client import SglangServer
from megatron_fipo.rollout.servers.vllm.client import VllmServer
from tests.end_to_end.runs import QUICKSTART, ROOT, SMALL
from tests.engines import streamed
from tests.engines.environments import server_python

LEAVES_AFTER = 6
"""The one is asked to leave, and the other killed, when it has been asked for so many responses."""
CALLS = ("info", "pause", "end_update", "checksums", "score", "score_end", "generate")
"""What servers are watched for."""
CLIENTS: dict[str, type[Any]] = {"sglang": SglangServer, "vllm": VllmServer}


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


# --- on ranks --------------------------------------------------------------------------------------------------------


def join(engine: str, joins_in: int, folder: Path, asked: Path, logs: list[Path], pids: list[int]) -> None:
    """Have two commands' servers join a run; the first command is asked to end later, the second one killed.

    Args:
        joins_in: the step whose handover takes them in: the step before waits for them.
        folder: the run's.
        asked: takes notes of what these servers are asked.
        logs: the output of the two commands.
        pids: their processes.
    """
    joined = folder / "servers" / "joined"
    _watch(CLIENTS[engine], asked, joined, logs, pids)
    if os.environ["RANK"] != "0":
        return
    update = Actor.update

    def waiting(self: Actor, microbatches: Any, loss_function: Any, step: int) -> Any:
        if step == joins_in - 1:
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

    for name in CALLS:
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
