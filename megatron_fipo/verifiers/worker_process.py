"""The pool's handle on one worker process: start it, send it a batch, receive verdicts, kill it.

A worker is not trusted: `wire` checks what it sends, every wait for it has a time-out, its output is escaped and cut,
and its folder for temporary files is removed when it is killed.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from megatron_fipo.system.text_hygiene import clean_text
from megatron_fipo.verifiers.isolation import WorkerSetup, environment_of
from megatron_fipo.verifiers.verdict import Verdict
from megatron_fipo.verifiers.wire import FrameReader, MalformedMessageError, read_verdict

START_TIMEOUT_S = 120.0
"""Longest start of a worker, with its imports; generous, since all ranks of a node import from one disk at once."""

EXIT_TIMEOUT_S = 5.0
"""Longest wait for the end of a worker that was killed or closed its connection."""

SEND_TIMEOUT_S = 60.0
"""Longest time until a worker has received a batch."""

FORK_GRACE_S = 10.0
"""Time beyond the time-out that a worker that forks gets, since it enforces the time-out itself."""

MAX_PRINTED_CHARACTERS = 2_000
"""Number of characters of a verifier's output on one response that are passed on."""

MAX_PRINTED_BYTES = 2**22
"""Output that is read from a verifier on one response. One that prints more blocks until its time-out."""


class VerifierUnavailableError(ValueError, RuntimeError):
    """A verifier cannot be used; every worker would fail alike. A ValueError, since the user's input must change."""


class WorkerDiedError(RuntimeError):
    """A worker ended, or stopped taking part, during its start or a response."""


class WorkerTimeoutError(RuntimeError):
    """A worker took too long for one response, or for its start."""


class WokenError(RuntimeError):
    """The wait was ended through the wake-up file descriptor."""


class WorkerProcess:
    """One worker, in a session of its own: Ctrl-C does not reach it, and killing it kills its children, too."""

    def __init__(self, setup: WorkerSetup, wake_fd: int) -> None:
        """Start the process; `wait_until_ready` waits for it.

        Args:
            setup: the worker's settings.
            wake_fd: a file descriptor that, once readable, ends any wait with WokenError.
        """
        self.setup = setup
        self._wake_fd = wake_fd
        self._scratch = tempfile.mkdtemp(prefix="megatron-fipo-verifier-")
        self._socket, remote = socket.socketpair()
        self._socket.setblocking(False)
        self._frames = FrameReader(self._socket.fileno())
        self._printed_fd, printed_write_fd = os.pipe()
        self._printed_bytes = 0
        self._printed_characters = 0
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_fipo.verifiers.worker", str(remote.fileno())],
                pass_fds=[remote.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=printed_write_fd,
                stderr=printed_write_fd,
                start_new_session=True,
                env=environment_of(setup.isolation, self._scratch),
            )
        finally:
            remote.close()
            os.close(printed_write_fd)
        # Time-outs count from the start of a response: the worker's clock is the same as ours (CLOCK_MONOTONIC).
        self._last_done_at = time.monotonic()
        self._started_at = self._last_done_at

    @property
    def pid(self) -> int:
        """Process id, and the id of its process group."""
        return self._process.pid

    def wait_until_ready(self) -> None:
        """Send the worker its settings, and wait until it can judge.

        Raises:
            VerifierUnavailableError: if it reports that a verifier cannot be used; another worker would, too.
            WorkerDiedError, WorkerTimeoutError: if it ends or takes too long.
            MalformedMessageError: if what it sends is no frame.
            WokenError: if the wake-up file descriptor became readable.
        """
        deadline = self._started_at + START_TIMEOUT_S
        self._send(self.setup, deadline)
        problem = self._receive(deadline).get("problem")
        if not isinstance(problem, str):
            raise WorkerDiedError("it said neither that it is ready nor why not")
        if problem:
            raise VerifierUnavailableError(clean_text(problem, 4000))

    def send(self, batch: list[tuple[str, bytes]]) -> None:
        """Send a batch of jobs, as (verifier's name, pickled job).

        Raises:
            WorkerDiedError: if the worker ended since the last batch, or does not receive this one in time.
            WokenError: if the wake-up file descriptor became readable.
        """
        self._last_done_at = time.monotonic()
        try:
            self._send(batch, self._last_done_at + SEND_TIMEOUT_S)
        except WorkerTimeoutError as error:
            raise WorkerDiedError("it did not receive its batch in time") from error
        self._last_done_at = time.monotonic()

    def receive(self) -> Verdict:
        """Receive the next verdict of the batch.

        Raises:
            MalformedMessageError: if the worker sends something that is no verdict.
            WorkerDiedError: if the worker ended.
            WorkerTimeoutError: if the response takes longer than the time-out.
            WokenError: if the wake-up file descriptor became readable.
        """
        self._printed_bytes = self._printed_characters = 0
        grace_s = FORK_GRACE_S if self.setup.isolation.is_forked else 0.0
        message = self._receive(self._last_done_at + self.setup.timeout_s + grace_s)
        done_at = message.get("done_at")
        if isinstance(done_at, bool) or not isinstance(done_at, int | float) or not math.isfinite(done_at):
            raise MalformedMessageError(f"a time that is not a finite number: {done_at!r:.100}")
        verdict = read_verdict(message)
        # The worker began the next response at done_at; the limits keep a forged time from extending its time-out.
        self._last_done_at = min(max(float(done_at), self._last_done_at), time.monotonic())
        return verdict

    def kill(self) -> None:
        """Kill the process and its group, wait for its end up to EXIT_TIMEOUT_S, and remove its temporary files."""
        self._socket.close()
        # The group does not exist if the worker has died without children (macOS raises PermissionError then).
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        # A process in uninterruptible sleep dies when it wakes; there is no need to wait for that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_TIMEOUT_S)
        self._pass_on_printed()
        os.close(self._printed_fd)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _send(self, message: Any, deadline: float) -> None:
        content = pickle.dumps(message)
        # The format that multiprocessing.connection.Connection.recv reads in the worker.
        header = struct.pack("!i", len(content)) if len(content) < 2**31 else struct.pack("!iQ", -1, len(content))
        view = memoryview(header + content)
        while view:
            self._wait(select.POLLOUT, deadline)
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                raise WorkerDiedError(self._exit_report()) from error

    def _receive(self, deadline: float) -> Mapping[str, Any]:
        while True:
            message = self._frames.next_frame()
            if message is not None:
                return message
            self._wait(select.POLLIN, deadline)
            try:
                is_open = self._frames.read_more()
            except (ConnectionResetError, BlockingIOError) as error:
                raise WorkerDiedError(self._exit_report()) from error
            if not is_open:
                raise WorkerDiedError(self._exit_report())

    def _wait(self, event: int, deadline: float) -> None:
        """Wait until the socket is ready for `event`, and pass on the worker's output meanwhile."""
        while True:
            poll = select.poll()
            poll.register(self._wake_fd, select.POLLIN)
            poll.register(self._socket, event)
            if self._printed_bytes < MAX_PRINTED_BYTES:
                poll.register(self._printed_fd, select.POLLIN)
            ready = dict(poll.poll(max(deadline - time.monotonic(), 0.0) * 1000))
            if self._wake_fd in ready:
                raise WokenError
            if not ready:
                raise WorkerTimeoutError
            if self._printed_fd in ready and not self._pass_on_printed():
                self._printed_bytes = MAX_PRINTED_BYTES  # closed: do not poll it again
            if self._socket.fileno() in ready:
                return
            if time.monotonic() > deadline:
                raise WorkerTimeoutError

    def _pass_on_printed(self) -> bool:
        """Write the worker's output to standard error, escaped and up to the limit; False if it closed the pipe."""
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(self._printed_fd, False)
            piece = os.read(self._printed_fd, 65536)
            self._printed_bytes += len(piece)
            left = MAX_PRINTED_CHARACTERS - self._printed_characters
            if piece and left > 0:
                text = clean_text(piece.decode(errors="replace"), left)
                self._printed_characters += len(text)
                sys.stderr.write(text if text.endswith("\n") else f"{text}\n")
                sys.stderr.flush()
            return bool(piece)
        return True

    def _exit_report(self) -> str:
        """Wait for the process to end; returns its exit code or signal as text."""
        try:
            code = self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection without ending"
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"signal {name}" + (", as where memory runs out" if -code == signal.SIGKILL else "")
