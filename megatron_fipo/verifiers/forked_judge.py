"""Judges each response in a process of its own, forked from one that has imported everything and run no response.

Whatever a response does to its process, be it a crash, a hang or running as code, ends with that process. The process
is confined (`confinement`), has no connection to the pool, and answers through a pipe of its own. Its verdict carries a
nonce, so that data which a response writes to every open file is not taken for a verdict.

A response that runs as code inside a user's verifier can still forge its own verdict: a verifier that evaluates a
model's text leaves the verdict on that one response to the model.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import pickle
import re
import resource
import secrets
import select
import signal
import time
import traceback

from megatron_fipo.system.parent_death import signal_when_parent_ends
from megatron_fipo.verifiers import confinement
from megatron_fipo.verifiers.judging import judge
from megatron_fipo.verifiers.registry import shown_name
from megatron_fipo.verifiers.syscall_filter import SandboxUnavailableError
from megatron_fipo.verifiers.verdict import Verdict
from megatron_fipo.verifiers.wire import (
    MAX_FRAME_BYTES,
    MalformedMessageError,
    read_object,
    read_verdict,
    verdict_fields,
    write_all,
)

EXIT_PATIENCE_S = 1.0
"""Longest wait for the end of a process that closed its pipe without a verdict, to learn its exit code."""

_NOT_ALLOWED = re.compile(
    r"PermissionError|Operation not permitted|Permission denied|can't start new thread|gaierror|name resolution"
)


class ThreadsError(RuntimeError):
    """A process that must fork has other threads."""


class ForkingJudge:
    """Forks from this process, which must have one thread: locks held by others would stay locked in the fork."""

    def __init__(self, timeout_s: float, program: bytes, own_fds: tuple[int, int], hint: str = "") -> None:
        """Prepare this process, and check that a child can be confined.

        Args:
            timeout_s: longest time for one response.
            program: filter of system calls (`syscall_filter`) for every child.
            own_fds: file descriptors that every child closes: the connection to the pool, and the folder
                /proc/self/task, opened before reading was restricted.
            hint: appended to an error that the confinement seems to have caused.

        Raises:
            SandboxUnavailableError: if children cannot be confined here.
            ThreadsError: if this process has several threads.
        """
        self._timeout_s, self._filter, self._own_fds, self._hint = timeout_s, program, own_fds, hint
        self._parent = os.getpid()
        # All objects so far stay alive: exempt them, since a child's garbage collection would copy their pages.
        gc.collect()
        gc.freeze()
        self._try_confinement()

    def judge(self, name: str, pickled: bytes) -> Verdict:
        """Judge one pickled job of the verifier `name`; every failure becomes a verdict with an error."""
        nonce = secrets.token_hex(16)
        read_fd, write_fd = os.pipe()
        child = self._fork()
        if child == 0:
            os.close(read_fd)
            self._judge_in_child(pickled, write_fd, nonce)
        os.close(write_fd)
        try:
            received, problem = self._watch(child, read_fd)
        finally:
            os.close(read_fd)
        if not problem:
            try:
                message = read_object(received)
                if message.pop("nonce", None) != nonce:
                    raise MalformedMessageError("a message without the nonce of a verdict")
                verdict = read_verdict(message)
            except MalformedMessageError as error:
                problem = f"wrote to its process's pipe {error}"
        if problem:
            return Verdict(0.0, error=f"verifier {shown_name(name)} {problem}")
        if self._hint and _NOT_ALLOWED.search(verdict.error):
            return Verdict(0.0, error=f"{verdict.error}. {self._hint}")
        return verdict

    def _fork(self) -> int:
        num_threads = len(os.listdir(self._own_fds[1]))
        if num_threads != 1:
            raise ThreadsError(f"its process has other threads ({num_threads - 1}) and must fork for each response")
        return os.fork()

    def _judge_in_child(self, pickled: bytes, write_fd: int, nonce: str) -> None:
        """Judge one response in the child process, then exit; does not return."""
        code = 1
        try:
            self._confine_child()
            verdict = judge(pickle.loads(pickled), self._timeout_s)
            write_all(write_fd, json.dumps({"nonce": nonce, **verdict_fields(verdict)}).encode())
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:  # noqa: BLE001 - nothing may leave this function in a child
            traceback.print_exc()
        finally:
            os._exit(code & 0xFF)

    def _confine_child(self) -> None:
        for fd in self._own_fds:
            os.close(fd)
        signal_when_parent_ends(signal.SIGKILL, self._parent)
        cpu_s = math.ceil(self._timeout_s) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
        confinement.restrict_calls(self._filter)

    def _watch(self, child: int, read_fd: int) -> tuple[bytes, str]:
        """Return what a child wrote until it closed its pipe, and what went wrong, if anything; the child is reaped."""
        received, problem = bytearray(), ""
        deadline = time.monotonic() + self._timeout_s
        poll = select.poll()
        poll.register(read_fd, select.POLLIN)
        is_open = True
        while is_open and not problem:
            if not poll.poll(max(deadline - time.monotonic(), 0.0) * 1000):
                problem = f"took longer than verifier.timeout_s={self._timeout_s:g} and was killed"
                break
            piece = os.read(read_fd, 65536)
            received += piece
            is_open = bool(piece)
            if len(received) > MAX_FRAME_BYTES:
                problem = f"wrote to its process's pipe more than {MAX_FRAME_BYTES} bytes"
        ending = self._end(child, EXIT_PATIENCE_S if not problem and not received else 0.0)
        if not problem and not received:
            problem = f"ended its process ({ending})"
        return bytes(received), problem

    def _end(self, child: int, patience_s: float) -> str:
        """Wait up to `patience_s` seconds for a child, kill and reap it; returns its exit code or signal as text."""
        if patience_s:
            pidfd = os.pidfd_open(child)
            try:
                select.select([pidfd], [], [], patience_s)
            finally:
                os.close(pidfd)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"

    def _try_confinement(self) -> None:
        """Confine a child once; raises SandboxUnavailableError if that fails."""
        read_fd, write_fd = os.pipe()
        child = self._fork()
        if child == 0:
            reason = ""
            try:
                self._confine_child()
                with contextlib.suppress(PermissionError):
                    os.kill(os.getpid(), 0)
                    reason = "the kernel accepted a filter of system calls and does not enforce it"
            except BaseException as error:  # noqa: BLE001 - nothing may leave this function in a child
                reason = str(error) or type(error).__name__
            finally:
                os.write(write_fd, reason.encode(errors="replace")[:1000] or b"confined")
                os._exit(0)
        os.close(write_fd)
        with open(read_fd, "rb") as pipe:
            reason = pipe.read().decode(errors="replace")
        os.waitpid(child, 0)
        if reason != "confined":
            raise SandboxUnavailableError(reason or "a process died while it was confined")
