"""Run a function on several ranks of a real torch.distributed world on this machine, each in a process of its own.

Without GPUs ranks are forked from a server process that has imported what they need once: a launch then costs about a
second instead of the twenty that those imports take. With GPUs they are started afresh, because a CUDA context does
not survive a fork.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.distributed import TCPStore

from megatron_fipo.parallel import by_value

_SETTLE_S = 0.5
"""After the first failure, failures are collected for this long: a rank that failed as a consequence may report before
the one that caused it."""


class RankError(RuntimeError):
    """A rank failed or did not end in time; the message holds the traceback of the rank that failed first."""


@dataclass(frozen=True)
class _Answer:
    """The result or the failure of a rank."""

    result: Any
    failure: str | None
    time_s: float
    """When it ended, by CLOCK_MONOTONIC, which all processes of a machine share."""


def run_local_ranks(
    target: Callable[..., Any],
    world_size: int,
    *args: Any,
    preload: Sequence[str] = (),
    timeout_s: float = 600.0,
) -> list[Any]:
    """Call `target(*args)` on every rank and return what each returned, by rank.

    Args:
        target: a module-level function. It finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its
            environment, as under torchrun. Arguments and results are pickled.
        preload: modules that the server process imports before it forks; what it has imported once stays.
        timeout_s: after this long all ranks are killed.

    Raises:
        RankError: with the traceback of the rank that failed first, or naming those that did not end in time.
    """
    context = _context(preload)
    # The parent owns the rendezvous, so that no port is chosen before it is bound.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    try:
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank_main, args=(theirs, rank, world_size, store.port, target, args))
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        return _collect(pipes, timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _context(preload: Sequence[str]) -> Any:
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload(list(preload))
    return context


def _collect(pipes: Sequence[Connection], timeout_s: float) -> list[Any]:
    deadline = time.monotonic() + timeout_s
    answers: dict[int, _Answer] = {}
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        failed = any(answer.failure for answer in answers.values())
        ready = wait(list(waiting), timeout=_SETTLE_S if failed else max(deadline - time.monotonic(), 0))
        if not ready and not failed:
            raise RankError(f"ranks {sorted(waiting.values())} of {len(pipes)} did not end within {timeout_s:.0f} s")
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            answers[waiting[pipe]] = _receive(pipe)
    failures = {rank: answer for rank, answer in answers.items() if answer.failure}
    if failures:
        first = min(failures, key=lambda rank: failures[rank].time_s)
        raise RankError(f"rank {first} of {len(pipes)}:\n{failures[first].failure}")
    return [answers[rank].result for rank in range(len(pipes))]


def _receive(pipe: Connection) -> _Answer:
    try:
        answer = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return _Answer(None, "the process died without a word (killed, or out of memory)", time.monotonic())
    assert isinstance(answer, _Answer)
    return answer


def _rank_main(
    pipe: Connection, rank: int, world_size: int, port: int, target: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    # What was imported before the fork stays: a collector that looks through it copies the pages that it touches.
    gc.freeze()
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store is the parent's: no rank is to open one.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    try:
        # A pipe's own pickler would share tensors with a process that is about to end.
        answer = by_value.dumps(_Answer(target(*args), None, time.monotonic()))
    except BaseException:  # noqa: BLE001 - whatever it is, the parent raises it
        answer = pickle.dumps(_Answer(None, traceback.format_exc(), time.monotonic()))
    try:
        pipe.send_bytes(answer)
    finally:
        pipe.close()
