"""Judges each response in a process of its own, forked from one that has everything imported and has seen no response.

What a response does to its process, whether it crashes it, hangs it or turns into code in it, ends with that process.
The process is confined (`confinement`), knows no way to the pool, and answers through a pipe of its own with a word
that only its verdict carries, so that what a response writes to every file it finds is not taken for one.

A response that runs as code inside a verifier of the user's can still say what it likes about itself: whoever evaluates
a model's text there judges at the model's mercy, this one response long.
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
"""Longest wait for the end of a process that closed its pipe without a verdict, to learn how it ended."""

_NOT_ALLOWED = re.compile(
    r"PermissionError|Operation not permitted|Permission denied|can't start new thread|gaierror|name resolution"
)


class ThreadsError(RuntimeError):
    """A process that was to fork has threads."""


class ForkingJudge:
    """Forks from this process, which must have one thread: a fork of several copies their locks, held for ever."""

    def __init__(self, timeout_s: float, program: bytes, own_fds: tuple[int, int], hint: str = "") -> None:
        """Prepare, and try it once.

        Args:
            timeout_s: longest time for one response.
            program: filter of system calls (`syscall_filter`) of every child.
            own_fds: the way to the pool, and the folder /proc/self/task, opened before files were restricted; closed
                in every child.
            hint: appended to an error that looks like the confinement's doing.

        Raises:
            SandboxUnavailableError: if children cannot be confined here.
            ThreadsError: if this process has several threads.
        """
        self._timeout_s, self._filter, self._own_fds, self._hint = timeout_s, program, own_fds, hint
        self._parent = os.getpid()
        # What is there now stays for ever: the collector of a child need not look at it, which would copy it.
        gc.collect()
        gc.freeze()
        self._try_confinement()

    def judge(self, name: str, pickled: bytes) -> Verdict:
        """Judge one pickled job of the verifier `name`; whatever happens is a verdict."""
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
                    raise MalformedMessageError("a message without the word of a verdict")
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
            raise ThreadsError(f"{num_threads - 1} threads run beside it, and each response is judged in a fork")
        return os.fork()

    def _judge_in_child(self, pickled: bytes, write_fd: int, nonce: str) -> None:
        """Judge one response in the child process, and end it; does not return."""
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
        """What a child wrote until it closed its pipe, or what it did instead, in words; it is gone afterwards."""
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
        """Have a child gone, killed if need be after `patience_s`; how it ended, in words."""
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
        """Raises SandboxUnavailableError if a child cannot be confined."""
        read_fd, write_fd = os.pipe()
        child = self._fork()
        if child == 0:
            reason = ""
            try:
                self._confine_child()
                with contextlib.suppress(PermissionError):
                    os.kill(os.getpid(), 0)
                    reason = "the kernel took a filter of system calls and does not hold to it"
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
            raise SandboxUnavailableError(reason or "a process that was to be confined died")
