"""Run a function on several ranks of a real torch.distributed world on this machine.

Ranks are forked from a server process that has imported torch and Megatron-Core once, so a launch costs about a second
instead of the twenty that those imports take. Every rank asserts for itself; the first failing rank's traceback is what
the test shows.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.parallel.preload"])


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


def run_ranks(target: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 240.0) -> list[Any]:
    """Call `target(*args)` on every rank and return what each returned.

    Args:
        target: a module-level function; it finds RANK and WORLD_SIZE in the environment, as under torchrun.
        timeout_s: after this long all ranks are killed and the test fails.

    Raises:
        RankError: with the traceback of the first rank that failed, or naming the ranks that did not end in time.
    """
    port = _free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = _FORKSERVER.Pipe(duplex=False)
        process = _FORKSERVER.Process(target=_rank_main, args=(theirs, rank, world_size, port, target, args))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankError(f"ranks {sorted(waiting.values())} of {len(pipes)} did not end within {timeout_s:.0f} s")
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                failure, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                failure = "the process died without a word (killed, or out of memory)"
            if failure:
                raise RankError(f"rank {rank} of {len(pipes)}:\n{failure}")
    return [results[rank] for rank in range(len(pipes))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank_main(
    pipe: Connection, rank: int, world_size: int, port: int, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        # By value: tensors sent through a pipe's own pickler would be shared with a process that is about to end.
        answer = pickle.dumps((None, target(*args)))
    except BaseException:  # noqa: BLE001 - whatever it was, the test is to show it
        answer = pickle.dumps((traceback.format_exc(), None))
    try:
        pipe.send_bytes(answer)
    finally:
        pipe.close()
