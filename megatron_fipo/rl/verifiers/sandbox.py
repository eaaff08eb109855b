"""Runs a Python program that nobody vouches for, in a process of its own under limits; Linux only.

What holds for the program, root or not, in a container or not: no network, no new processes, no signals to other
processes, nothing written but its standard output, at most `Limits` of CPU time, wall time, memory and output. It sees
the standard library only, an empty environment, and an empty folder that is deleted afterwards. Enforced by resource
limits and a seccomp filter (`syscall_filter`); where the kernel has Landlock (5.13), files other than Python's and the
system's libraries cannot be read either. Hash seeds are fixed, so that sets of strings have one order.

What does not hold: the tests of `run_python` are run by the interpreter that ran the program, which may have tampered
with it: a result whose `==` is always true passes `assert`. Programs that are fed an input and compared by their
output have no such way out.
"""

from __future__ import annotations

import base64
import json
import math
import os
import secrets
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from megatron_fipo.rl.verifiers.syscall_filter import SandboxUnavailableError, syscall_filter

_CHILD = Path(__file__).with_name("sandbox_child.py")
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
_MAX_RESULT_BYTES = 1000


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        wall_s: time; CPU time, of all threads together, has the next whole second but one as its limit.
        memory_bytes: address space, the interpreter's (about 20 MB) included.
        output_bytes: standard output.
    """

    wall_s: float = 8.0
    memory_bytes: int = 2**30
    output_bytes: int = 2**20


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: it ran to its end without an error and, where there were tests, so did they.
        stdout: what it wrote, up to the limit.
        problem: why it did not pass, empty if it did.
    """

    passed: bool
    stdout: bytes
    problem: str = ""


def run_python(program: str, *, limits: Limits, tests: str = "", stdin: str = "", protected: bool = True) -> Outcome:
    """Run a program to its end, then tests in its namespace.

    Args:
        program: source. Its __name__ is "__main__", or "solution" where there are tests.
        limits: of the program and its tests together.
        tests: source, such as assert statements; empty for none.
        stdin: text of the standard input.
        protected: False keeps the limits but allows every system call.

    Raises:
        SandboxUnavailableError: if the protection cannot be had here.
    """
    token = secrets.token_hex(16)
    spec: dict[str, Any] = {
        "program": program,
        "has_tests": bool(tests),
        "limits": {"cpu_s": math.ceil(limits.wall_s) + 1, "memory_bytes": limits.memory_bytes},
        "syscall_filter": base64.b64encode(syscall_filter()).decode() if protected else None,
    }
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-fipo-program-"))
        spec["readable"] = [folder, *_readable_folders()]
        spec_file = stack.enter_context(_file_with(json.dumps(spec)))
        tests_file = stack.enter_context(_file_with(json.dumps({"source": tests, "token": token})))
        stdin_file = stack.enter_context(_file_with(stdin))
        result_read, result_write = os.pipe()
        result = stack.enter_context(open(result_read, "rb", buffering=0))
        fds = [spec_file.fileno(), tests_file.fileno(), result_write]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-X", "utf8", str(_CHILD), *map(str, fds)],
                stdin=stdin_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=fds,
                cwd=folder,
                env={"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"},
                # Under protection it has no children, and stays in the group that dies with a verifier's worker.
                start_new_session=not protected,
            )
        finally:
            os.close(result_write)
        try:
            stdout, message, problem = _watch(process, result, limits)
        finally:
            _end(process, whole_group=not protected)
    if message.startswith(b"unprotected:"):
        raise SandboxUnavailableError(message.decode(errors="replace"))
    if not problem and process.returncode:
        problem = _ending(process.returncode)
    if not problem and tests and message != token.encode():
        problem = "it ended before its tests had run"
    return Outcome(not problem, stdout, problem)


@cache
def check_available() -> None:
    """Run an empty program under protection, once per process.

    Raises:
        SandboxUnavailableError: if that is impossible here.
    """
    outcome = run_python("", limits=Limits(wall_s=60.0), tests="pass")
    if not outcome.passed:
        raise SandboxUnavailableError(f"an empty program does not run under protection: {outcome.problem}")


def _watch(process: subprocess.Popen[bytes], result: IO[bytes], limits: Limits) -> tuple[bytes, bytes, str]:
    """Read both pipes until they close; returns what came, and the limit that was hit, if one was."""
    assert process.stdout is not None
    deadline = time.monotonic() + limits.wall_s
    received = {process.stdout.fileno(): bytearray(), result.fileno(): bytearray()}
    sizes: Mapping[int, int] = {process.stdout.fileno(): limits.output_bytes, result.fileno(): _MAX_RESULT_BYTES}
    problem = ""
    with selectors.DefaultSelector() as selector:
        for fd in received:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and not problem:
            ready = selector.select(max(deadline - time.monotonic(), 0.0))
            if not ready:
                problem = f"it took longer than {limits.wall_s:g} s"
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                received[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                elif len(received[key.fd]) > sizes[key.fd]:
                    problem = f"it wrote more than {sizes[key.fd]} bytes"
    if not problem:
        try:
            process.wait(max(deadline - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            problem = f"it took longer than {limits.wall_s:g} s"
    stdout, message = received.values()
    return bytes(stdout), bytes(message), problem


def _end(process: subprocess.Popen[bytes], whole_group: bool) -> None:
    if whole_group:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _file_with(text: str) -> IO[bytes]:
    """An unnamed temporary file, to be read from its start; the caller closes it."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(text.encode("utf-8", "replace"))
    file.seek(0)
    return file


@cache
def _readable_folders() -> tuple[str, ...]:
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"}
    return tuple(sorted(path for path in {*libraries, *_SYSTEM_LIBRARIES} if os.path.isdir(path)))


def _ending(returncode: int) -> str:
    return f"exit code {returncode}" if returncode > 0 else f"signal {signal.Signals(-returncode).name}"
