"""The pool's handle on one worker process: start it, send it a batch, receive verdicts, kill it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import megatron_fipo
from megatron_fipo.rl.verifiers.verdict import Verdict

START_TIMEOUT_S = 120.0
"""Longest start of a worker, imports included; generous, since a node's ranks import from one disk at once."""

EXIT_TIMEOUT_S = 5.0
"""Longest wait for a worker to end after it was told or forced to."""


class WorkerStartError(RuntimeError):
    """A worker could not load its verifiers; every other worker would fail alike."""


class WorkerDiedError(RuntimeError):
    """A worker ended in the middle of a response."""


class WorkerTimeoutError(RuntimeError):
    """A worker took too long over one response."""


class WokenError(RuntimeError):
    """The wait was ended through the wake-up file descriptor."""


class WorkerProcess:
    """One worker, in a session of its own: Ctrl-C does not reach it, and a kill takes its children along."""

    def __init__(self, verifiers: Sequence[str], timeout_s: float, memory_gib: float, wake_fd: int) -> None:
        """Start the process without waiting for it; `wait_until_ready` does.

        Args:
            verifiers: names to import before the first response.
            timeout_s: longest time for one response.
            memory_gib: address space that the process may take.
            wake_fd: a file descriptor that, once readable, ends any wait with WokenError.
        """
        self._timeout_s = timeout_s
        self._wake_fd = wake_fd
        self._connection, remote = Pipe()
        package_root = str(Path(megatron_fipo.__file__).parents[1])
        python_path = os.pathsep.join(path for path in (package_root, os.environ.get("PYTHONPATH", "")) if path)
        arguments = [str(remote.fileno()), str(timeout_s), str(memory_gib), *verifiers]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.rl.verifiers.worker", *arguments],
            pass_fds=[remote.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        remote.close()
        # Time-outs count from the start of a response: the worker's clock is the same as ours (CLOCK_MONOTONIC).
        self._last_done_at = time.monotonic()

    @property
    def pid(self) -> int:
        """Process id, and the id of its process group."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Wait until the verifiers are imported.

        Raises:
            WorkerStartError: if they cannot be, with the worker's traceback.
        """
        try:
            problem: str = self._receive(time.monotonic() + START_TIMEOUT_S)
        except WorkerTimeoutError as error:
            raise WorkerStartError(f"a verifier worker was not ready within {START_TIMEOUT_S:g} s") from error
        except WorkerDiedError as error:
            raise WorkerStartError(f"a verifier worker died while it started: {error}") from error
        if problem:
            raise WorkerStartError(f"a verifier worker could not load its verifiers:\n{problem}")

    def send(self, batch: list[bytes]) -> None:
        """Send a batch of pickled jobs.

        Raises:
            WorkerDiedError: if the worker ended since the last batch.
        """
        self._last_done_at = time.monotonic()
        try:
            self._connection.send(batch)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WorkerDiedError(self._epitaph()) from error

    def receive(self) -> Verdict:
        """Receive the next verdict of the batch.

        Raises:
            WorkerDiedError: if the worker ended.
            WorkerTimeoutError: if the response takes longer than the time-out.
            WokenError: if the wake-up file descriptor became readable.
        """
        message: tuple[Verdict, float] = self._receive(self._last_done_at + self._timeout_s)
        verdict, self._last_done_at = message
        return verdict

    def kill(self) -> None:
        """End the process and whatever it started; returns when it is gone."""
        self._connection.close()
        # The group is gone already where the worker died and had no children (PermissionError says so on macOS).
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        # A process in uninterruptible sleep dies when it wakes; nothing here needs to wait for that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_TIMEOUT_S)

    def _receive(self, deadline: float) -> Any:
        ready = wait([self._connection, self._wake_fd], timeout=max(deadline - time.monotonic(), 0.0))
        if self._wake_fd in ready:
            raise WokenError
        if not ready:
            raise WorkerTimeoutError
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDiedError(self._epitaph()) from error

    def _epitaph(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection without ending"
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
