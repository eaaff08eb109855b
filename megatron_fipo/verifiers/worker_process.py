"""The pool's handle on one worker process: start it, send it a batch, receive verdicts, kill it.

A worker is not trusted: what it sends is read by `wire`, no wait for it is without an end, what it prints is escaped
and bounded, and what it leaves in its folder for temporary files is removed with it.
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
"""Longest start of a worker, imports included; generous, since a node's ranks import from one disk at once."""

EXIT_TIMEOUT_S = 5.0
"""Longest wait for a worker to end after it was told or forced to."""

SEND_TIMEOUT_S = 60.0
"""Longest time that a worker may take to take a batch."""

FORK_GRACE_S = 10.0
"""Extra time beyond the time-out for a worker that forks, since it enforces the time-out itself."""

MAX_PRINTED_CHARACTERS = 2_000
"""Most text that is passed on of what a verifier prints while it judges one response."""

MAX_PRINTED_BYTES = 2**22
"""Most text that a verifier may print while it judges one response; beyond, it waits and runs into its time-out."""


class VerifierUnavailableError(ValueError, RuntimeError):
    """A verifier cannot be used: every worker would fail alike. What the user gave has to change, hence ValueError."""


class WorkerDiedError(RuntimeError):
    """A worker ended in the middle of a response, or of its start."""


class WorkerTimeoutError(RuntimeError):
    """A worker took too long over one response, or over its start."""


class WokenError(RuntimeError):
    """The wait was ended through the wake-up file descriptor."""


class WorkerProcess:
    """One worker, in a session of its own: Ctrl-C does not reach it, and a kill takes its children along."""

    def __init__(self, setup: WorkerSetup, wake_fd: int) -> None:
        """Start the process without waiting for it; `wait_until_ready` does.

        Args:
            setup: what it judges, and how.
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
        """Tell it what to judge, and wait until it can.

        Raises:
            VerifierUnavailableError: if it says that it cannot; another worker would say the same.
            WorkerDiedError, WorkerTimeoutError: if it does not come so far, for whatever reason.
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
            WorkerDiedError: if the worker ended since the last batch, or does not take it.
            WokenError: if the wake-up file descriptor became readable.
        """
        self._last_done_at = time.monotonic()
        try:
            self._send(batch, self._last_done_at + SEND_TIMEOUT_S)
        except WorkerTimeoutError as error:
            raise WorkerDiedError("it did not take its work") from error
        self._last_done_at = time.monotonic()

    def receive(self) -> Verdict:
        """Receive the next verdict of the batch.

        Raises:
            MalformedMessageError: if what comes is no verdict.
            WorkerDiedError: if the worker ended.
            WorkerTimeoutError: if the response takes longer than the time-out.
            WokenError: if the wake-up file descriptor became readable.
        """
        self._printed_bytes = self._printed_characters = 0
        grace_s = FORK_GRACE_S if self.setup.isolation.is_forked else 0.0
        message = self._receive(self._last_done_at + self.setup.timeout_s + grace_s)
        done_at = message.get("done_at")
        if isinstance(done_at, bool) or not isinstance(done_at, int | float) or not math.isfinite(done_at):
            raise MalformedMessageError(f"a time that is none: {done_at!r:.100}")
        verdict = read_verdict(message)
        # Its clock says when it began the next one; no clock of its own gives it more time than it has.
        self._last_done_at = min(max(float(done_at), self._last_done_at), time.monotonic())
        return verdict

    def kill(self) -> None:
        """End the process and whatever it started, and remove its temporary files; returns when it is gone."""
        self._socket.close()
        # The group is gone already where the worker died and had no children (PermissionError says so on macOS).
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        # A process in uninterruptible sleep dies when it wakes; nothing here needs to wait for that.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_TIMEOUT_S)
        self._pass_on_printed()
        os.close(self._printed_fd)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _send(self, message: Any, deadline: float) -> None:
        content = pickle.dumps(message)
        # As multiprocessing.connection.Connection.recv reads it at the other end.
        header = struct.pack("!i", len(content)) if len(content) < 2**31 else struct.pack("!iQ", -1, len(content))
        view = memoryview(header + content)
        while view:
            self._wait(select.POLLOUT, deadline)
            try:
                view = view[self._socket.send(view) :]
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                raise WorkerDiedError(self._epitaph()) from error

    def _receive(self, deadline: float) -> Mapping[str, Any]:
        while True:
            message = self._frames.next_frame()
            if message is not None:
                return message
            self._wait(select.POLLIN, deadline)
            try:
                is_open = self._frames.read_more()
            except (ConnectionResetError, BlockingIOError) as error:
                raise WorkerDiedError(self._epitaph()) from error
            if not is_open:
                raise WorkerDiedError(self._epitaph())

    def _wait(self, event: int, deadline: float) -> None:
        """Wait until the socket is ready, passing on meanwhile what the worker prints."""
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
                self._printed_bytes = MAX_PRINTED_BYTES  # closed: there is nothing more to listen to
            if self._socket.fileno() in ready:
                return
            if time.monotonic() > deadline:
                raise WorkerTimeoutError

    def _pass_on_printed(self) -> bool:
        """Print to standard error what the worker printed, escaped and up to the limit; False if it closed the pipe."""
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

    def _epitaph(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return "it closed its connection without ending"
        if code >= 0:
            return f"exit code {code}"
        name = signal.Signals(-code).name
        return f"signal {name}" + (", as where memory runs out" if -code == signal.SIGKILL else "")
