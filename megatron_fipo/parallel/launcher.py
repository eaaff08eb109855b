"""Starts a run's processes on this machine: what `megatron-fipo train --nproc N` does.

torchrun's own process contexts start and watch the ranks, under the same environment variables. Beyond torchrun: the
rendezvous listens on the loopback interface only, one sentence ends a run that failed (the failing rank's, no traceback
of the launcher), the failing rank's exit code is kept, and after Ctrl-C or SIGTERM a run has all the time it needs to
save. A second signal ends it at once. Several machines are torchrun's, or `megatron-fipo submit`'s.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from megatron_fipo.system.exit_codes import EXIT_KILLED
from megatron_fipo.system.parent_death import signal_when_parent_ends

COMMAND = "MEGATRON_FIPO_COMMAND"
"""Environment variable of the ranks: the command line that started them, which messages repeat to say how to resume."""

LAUNCHER = "MEGATRON_FIPO_LAUNCHER"
"""Environment variable of the ranks: process id of the launcher; when that process dies, they save and leave."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_HANDLED_BY_TORCH = "TORCHELASTIC_SIGNALS_TO_HANDLE"
"""Environment variable: the signals on which torch raises an exception, from when it starts processes."""
_POLL_S = 0.1


def launch(num_processes: int, arguments: Sequence[str], command: Sequence[str]) -> int:
    """Run `python -m megatron_fipo.train` with these arguments in `num_processes` processes, to their end.

    Args:
        num_processes: ranks; each becomes one process, on a GPU of its own where there are GPUs.
        arguments: configuration file and overrides.
        command: the command line as it was typed, which a message may give back.

    Returns:
        0, or the exit code of the rank that failed first; of a rank that a signal killed, 128 and the signal's number.
        The process is to leave with it: after a signal, further ones are ignored, so that none changes that code.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError(
            f"--nproc={num_processes} starts processes, but this is one that torchrun started (WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']}). Use one of the two: megatron-fipo train without torchrun, or "
            "torchrun … -m megatron_fipo.train."
        )
    # torch says in lines of its own which process failed; here the failing rank's sentence is the last one.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The launcher owns the rendezvous, so that no port is chosen before it is bound; the store outlives every rank.
    store = _store(num_processes)
    # Not ours: one that comes while processes are being started would end in a traceback, and be passed on to none.
    os.environ[_HANDLED_BY_TORCH] = signal.SIGQUIT.name
    with tempfile.TemporaryDirectory(prefix="megatron-fipo-launch-") as logs, _Signals() as signals:
        context = start_processes(
            name="megatron-fipo",
            entrypoint=sys.executable,
            args=dict.fromkeys(range(num_processes), ("-m", "megatron_fipo.train", *arguments)),
            envs={rank: _environment(rank, num_processes, store.port, command) for rank in range(num_processes)},
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        assert isinstance(context, SubprocessContext)
        signals.pass_on_to(context)
        try:
            return _wait(context)
        finally:
            context.close(signal.SIGKILL)


def _store(num_processes: int) -> TCPStore:
    """The rendezvous, on a free port of the loopback interface."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(max(128, num_processes))
        port = listener.getsockname()[1]
        # The store takes the descriptor over.
        return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _wait(context: SubprocessContext) -> int:
    """Wait for the ranks to end. Returns the exit code of the one that failed first, or 0."""
    ended: dict[int, int] = {}
    result = None
    while result is None:
        time.sleep(_POLL_S)
        # Before torch looks: once it sees a failure, it ends the others, and their exit codes say nothing.
        codes = {rank: handler.proc.poll() for rank, handler in context.subprocess_handlers.items()}
        ended = {rank: code for rank, code in codes.items() if code}
        result = context.wait(timeout=0)
    if not result.is_failed():
        return 0
    ended = ended or {rank: failure.exitcode for rank, failure in result.failures.items()}
    killed = [rank for rank, code in ended.items() if code < 0]
    if not killed:
        return min(ended.values())
    rank, number = killed[0], signal.Signals(-ended[killed[0]])
    _say(
        f"error: rank {rank} (process {context.pids()[rank]}) was ended by {number.name}{_REASONS.get(number, '')}. "
        "The same command goes on from the newest checkpoint."
    )
    return EXIT_KILLED + number


_REASONS = {
    signal.SIGKILL: ", which the kernel sends when memory runs out (`dmesg` says so), and whoever types kill -9",
    signal.SIGSEGV: ", a fault in native code",
    signal.SIGBUS: ", often a full /dev/shm or a file cut short while it was read",
}


def _environment(rank: int, num_processes: int, port: int, command: Sequence[str]) -> dict[str, str]:
    """The variables that torchrun would set on one machine, and those above."""
    environment = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        COMMAND: shlex.join(command),
        LAUNCHER: str(os.getpid()),
    }
    if "OMP_NUM_THREADS" not in os.environ:
        # Each rank would start as many threads as there are cores, and they would wait for one another.
        environment["OMP_NUM_THREADS"] = "1"
    return environment


class _Signals:
    """Passes the first signal on to the ranks, which save and leave, and ends them at the second."""

    def __init__(self) -> None:
        self.received = 0
        self._context: SubprocessContext | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def pass_on_to(self, context: SubprocessContext) -> None:
        """Send signals to these processes from now on, and a signal that came before as well."""
        self._context = context
        if self.received:
            self._send(signal.SIGTERM)

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._previous[signal.SIGQUIT] = signal.getsignal(signal.SIGQUIT)  # torch puts its own in its place
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            # A second one may come when the ranks have left already, and would end in an exit code of its own.
            signal.signal(number, signal.SIG_IGN if self.received and number in _SIGNALS else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        if self.received == 1:
            _say("stopping: the update in hand is finished and saved; once more ends the run at once, unsaved")
        self._send(signal.SIGTERM if self.received == 1 else signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        if self._context is None:
            return
        for pid in self._context.pids().values():
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue  # it has left already


def leave_with_the_launcher() -> None:
    """Arrange for this rank to get SIGTERM, on which it saves and leaves, when the launcher dies.

    Under torchrun, which ends its ranks itself, this does nothing.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    signal_when_parent_ends(signal.SIGTERM, int(launcher))


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
