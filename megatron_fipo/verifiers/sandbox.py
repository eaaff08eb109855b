"""Runs an untrusted Python program in a process of its own under limits; Linux only.

Root or not, in a container or not, the program has no network, starts no processes, signals no other process, writes
only to its standard output, and uses at most the `Limits` of CPU time, wall time, memory, threads and output. It sees
the standard library only, an empty environment, and an empty folder that is deleted afterwards. Resource limits and a
seccomp filter (`syscall_filter`) enforce this. Where the kernel has Landlock (5.13), the program can read no files but
Python's and the system's libraries. The hash seed is fixed, so that sets of strings have one order.

The program cannot read what it is compared with. The caller compares outputs and results. Tests run in a second
process, created before the program's first line; it asks the program's process for the results of calls, and receives
plain data (`sandbox_tests`). `same_process` lacks this protection: it runs the tests in the program's process, where
the program may have tampered with the interpreter. It is meant for tests that need more than the results of calls.
"""

from __future__ import annotations

import json
import marshal
import math
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

from megatron_fipo.verifiers.syscall_filter import SandboxUnavailableError, syscall_filter

_BOOTSTRAP = """
import sys
for name in ("megatron_fipo", "megatron_fipo.rl", "megatron_fipo.verifiers"):
    sys.modules[name] = package = type(sys)(name)
    package.__path__ = []
package.__path__ = [sys.argv.pop()]
from megatron_fipo.verifiers import sandbox_child
sandbox_child.main()
"""
"""Imports modules of this folder without the packages around it, which need more than the standard library."""

_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_MAX_STATUS_BYTES = 1000
_THREADS_EVERY_S = 0.02
"""Seconds between two checks of the number of threads, where the kernel does not limit it."""


@dataclass(frozen=True)
class Limits:
    """The limits of one program.

    Attributes:
        wall_s: wall time in seconds. The CPU time of all threads together is limited to ceil(wall_s) + 1 s.
        memory_bytes: address space, including the interpreter's (about 20 MB).
        output_bytes: size of the standard output, and likewise of the results of calls.
        num_threads: number of threads at any one moment.
    """

    wall_s: float = 8.0
    memory_bytes: int = 2**30
    output_bytes: int = 2**20
    num_threads: int = 256


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: whether it ran to its end without an error and, if there were tests, so did they.
        stdout: its standard output, up to the limit.
        problem: why it did not pass; empty if it did.
        results: what the calls of its function returned, as JSON's types, up to the first call that failed.
    """

    passed: bool
    stdout: bytes
    problem: str = ""
    results: tuple[Any, ...] = ()


@dataclass
class _Started:
    """A program's process, its pipes to this process, and the data received through them, by file descriptor."""

    process: subprocess.Popen[bytes]
    status: IO[bytes]
    result: IO[bytes]
    limits: Limits
    received: dict[int, bytearray] = field(default_factory=dict)


def run_python(
    program: str,
    *,
    limits: Limits,
    tests: str = "",
    stdin: str = "",
    prompt: str = "",
    entry_point: str = "",
    same_process: bool = False,
    judges_imports: bool = False,
    protected: bool = True,
) -> Outcome:
    """Run a program to its end, then tests that use its names.

    Args:
        program: source. Its __name__ is "__main__", or "solution" if there are tests.
        limits: the limits of the program and its tests together.
        tests: source, such as assert statements; empty for none.
        stdin: text of the standard input.
        prompt: the beginning of a module, which the program completes or follows.
        entry_point: the prompt's function that the program is to define.
        same_process: run the tests in the program's process, which can then deceive them.
        judges_imports: give the program the names that it uses without importing them, as judges do.
        protected: False keeps the limits but allows every system call and every file.

    Raises:
        SandboxUnavailableError: if the protection is not available here.
    """
    style = "stdin" if not tests else "same_process" if same_process else "tests"
    order = {
        "style": style,
        "name": "solution" if tests else "__main__",
        "prompt": prompt,
        "program": program,
        "imports": judges_imports,
        "tests": tests if same_process else "",
    }
    hidden = {"source": tests, "name": "solution", "prompt": prompt, "entry_point": entry_point}
    outcome, result = _run(order, limits, stdin, hidden if style == "tests" else None, protected)
    if outcome.passed and tests and result != b"passed":
        return Outcome(False, outcome.stdout, "it ended before its tests had run")
    return outcome


def call_python(
    program: str, function: str, calls: Sequence[Sequence[Any]], *, limits: Limits, protected: bool = True
) -> Outcome:
    """Run a program, then call its function, or that method of its class Solution, once for each list of arguments.

    Args:
        program: source. Its __name__ is "solution"; names that judges import need not be imported.
        function: name of the function or method.
        calls: arguments of each call, of JSON's types.
        limits: the limits of the program and all calls together.
        protected: as in `run_python`.

    Raises:
        SandboxUnavailableError: if the protection is not available here.
    """
    order = {
        "style": "calls",
        "name": "solution",
        "prompt": "",
        "program": program,
        "imports": True,
        "function": function,
        "calls": [list(call) for call in calls],
    }
    outcome, result = _run(order, limits, "", None, protected)
    results: list[Any] = []
    problem = outcome.problem
    for line in result.splitlines() if not problem else ():
        try:
            returned = json.loads(line)
            results.append(returned["value"])
        except (ValueError, LookupError, TypeError, RecursionError):
            break
    if not problem and len(results) != len(calls):
        problem = f"call {len(results) + 1} of {len(calls)} raised, or returned a value that is not of JSON's types"
    return Outcome(not problem, outcome.stdout, problem, tuple(results))


@cache
def check_available() -> None:
    """Run an empty program under protection, the first time that a process calls this.

    Raises:
        SandboxUnavailableError: if the protection is not available here.
    """
    outcome = run_python("", limits=Limits(wall_s=60.0), tests="pass")
    if not outcome.passed:
        raise SandboxUnavailableError(f"an empty program does not run under protection: {outcome.problem}")


def _run(
    order: dict[str, Any], limits: Limits, stdin: str, tests: dict[str, str] | None, protected: bool
) -> tuple[Outcome, bytes]:
    """Run a program; returns how it ended, and the data received through the pipe of results."""
    order["limits"] = {
        "cpu_s": math.ceil(limits.wall_s) + 1,
        "memory_bytes": limits.memory_bytes,
        "threads": limits.num_threads,
    }
    order["syscall_filter"] = syscall_filter() if protected else None
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron-fipo-program-"))
        order["readable"] = [folder, *_readable()]
        order_file = stack.enter_context(_file_with("order", marshal.dumps(order)))
        tests_file = stack.enter_context(_file_with("tests", marshal.dumps(tests)))
        stdin_file = stack.enter_context(_file_with("stdin", stdin.encode("utf-8", "replace")))
        status, status_write = _pipe(stack)
        result, result_write = _pipe(stack)
        fds = [order_file.fileno(), status_write, result_write, tests_file.fileno()]
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", _BOOTSTRAP, *map(str, fds), _FOLDER],
                stdin=stdin_file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=fds,
                cwd=folder,
                # With more malloc arenas, every thread would take 64 MiB of the address space.
                env={"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"},
                # A protected program starts no children, so it may stay in the process group of a verifier's worker,
                # which is killed with the worker.
                start_new_session=not protected,
            )
        finally:
            os.close(status_write)
            os.close(result_write)
        started = _Started(process, status, result, limits)
        try:
            problem = _watch(started)
        finally:
            _end(process, whole_group=not protected)
    assert process.stdout is not None
    stdout, said, returned = (bytes(received) for received in started.received.values())
    # Only our own code can have written this: the pipe is closed before the program runs.
    if b"unprotected:" in said:
        raise SandboxUnavailableError(said[said.index(b"unprotected:") :].decode(errors="replace").strip())
    if not problem and process.returncode:
        problem = _ending(process.returncode)
    return Outcome(not problem, stdout, problem), returned


def _pipe(stack: ExitStack) -> tuple[IO[bytes], int]:
    """Make a pipe; returns its read end, which the stack closes, and its write end, which the caller closes."""
    read_fd, write_fd = os.pipe()
    return stack.enter_context(open(read_fd, "rb", buffering=0)), write_fd


def _watch(started: _Started) -> str:
    """Read all pipes until they close; returns the limit that was exceeded, as text, or "" if none was."""
    process, limits = started.process, started.limits
    assert process.stdout is not None
    deadline = time.monotonic() + limits.wall_s
    status = started.status.fileno()
    sizes = {
        process.stdout.fileno(): limits.output_bytes,
        status: _MAX_STATUS_BYTES,
        started.result.fileno(): limits.output_bytes,
    }
    received = started.received = {fd: bytearray() for fd in sizes}
    too_late = f"it took longer than {limits.wall_s:g} s"
    with selectors.DefaultSelector() as selector:
        for fd in received:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            watched = _watched_processes(bytes(received[status]))
            if any(_num_threads(pid) > limits.num_threads for pid in watched):
                return f"it had more than {limits.num_threads} threads"
            left = max(deadline - time.monotonic(), 0.0)
            ready = selector.select(min(left, _THREADS_EVERY_S) if watched else left)
            if not ready and time.monotonic() >= deadline:
                return too_late
            for key, _ in ready:
                chunk = os.read(key.fd, 65536)
                received[key.fd] += chunk
                if not chunk:
                    selector.unregister(key.fd)
                elif len(received[key.fd]) > sizes[key.fd]:
                    return f"it wrote more than {sizes[key.fd]} bytes"
    try:
        process.wait(max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return too_late
    return ""


def _watched_processes(status: bytes) -> list[int]:
    """Ids of the processes whose threads the kernel does not limit, from their own status lines."""
    words = (line.split() for line in status.splitlines())
    return [int(line[1]) for line in words if len(line) == 2 and line[0] == b"parent"]


def _num_threads(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[17])
    except OSError:  # it has ended
        return 0


def _end(process: subprocess.Popen[bytes], whole_group: bool) -> None:
    if whole_group:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    elif process.poll() is None:
        process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def _file_with(name: str, data: bytes) -> IO[bytes]:
    """Make a file in memory, to be read from its start; the caller closes it.

    It is in no folder, so that a program may open its standard input by name (/dev/stdin) although most folders are
    closed to it.
    """
    file = open(os.memfd_create(f"megatron-fipo-{name}"), "r+b")  # noqa: SIM115
    file.write(data)
    file.seek(0)
    return file


_FOLDER = str(Path(__file__).parent)


@cache
def _readable() -> tuple[str, ...]:
    libraries = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"}
    return tuple(sorted(path for path in {*libraries, *_SYSTEM_LIBRARIES, *_DEVICES} if os.path.exists(path)))


def _ending(returncode: int) -> str:
    return f"exit code {returncode}" if returncode > 0 else f"signal {signal.Signals(-returncode).name}"
