"""Runs a command, and makes sure that nothing of it outlives the process that started this one.

    python process_guard.py GRACE_S COMMAND ...

The starter holds the other end of this process's standard input. When that closes, or the starter dies in whatever way,
the command's whole session gets SIGTERM, GRACE_S seconds later SIGKILL, and so does what left the session. The
command's process id is the one line on standard output; its own output goes to standard error. The exit status is the
command's, 128 + n after signal n. Standard library only: it runs by path, without this package.

Nor do its files remain. The command's temporary files go into a folder of its own, which is deleted with
it: engines leave sockets there whenever they are killed. Python's resource trackers among its children are left to give
back what the dead held in /dev/shm.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_S = 0.5
_TRACKERS_S = 5.0
"""Longest that resource trackers may take to give back what the dead held."""
_LEAST_UNIQUE = 32
"""A name of more characters than this is used by nobody else: it holds a UUID."""
_LONGEST_BASE = 40
"""Longest path, in bytes, of a folder in which a folder for sockets may be made: a socket's path is at most 107 bytes,
and engines name theirs by UUIDs."""


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def _die_with_guard() -> None:
    """Called in the child before exec: the kernel kills the command if this process is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _starter_is_gone(starter: int) -> bool:
    """Wait a moment; True once the input is closed or the parent is another one."""
    readable, _, _ = select.select([0], [], [], _POLL_S)
    return os.getppid() != starter or (bool(readable) and not os.read(0, 1))


def _signal_session(session: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)


def _descendants(pid: int) -> Iterator[int]:
    """All children of a process, and theirs."""
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                yield child
                yield from _descendants(child)


def _is_tracker(pid: int) -> bool:
    """Whether it is the process in which Python notes shared memory and semaphores, to unlink them at the end."""
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _kill_the_rest() -> None:
    """Kill and reap what is left. Descendants whose parents died have become children of this process.

    Resource trackers end by themselves, when the last of those that they serve has; they get a while for it.
    """
    deadline = time.monotonic() + _TRACKERS_S
    while left := list(_descendants(os.getpid())):
        others = [pid for pid in left if not _is_tracker(pid)]
        for pid in others or (left if time.monotonic() > deadline else ()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


@contextlib.contextmanager
def _own_folder() -> Iterator[dict[str, str]]:
    """An environment in which temporary files go into a folder that is deleted at the end."""
    usual = tempfile.gettempdir()
    base = usual if len(os.fsencode(usual)) <= _LONGEST_BASE else "/tmp"
    folder = tempfile.mkdtemp(prefix="fipo-server-", dir=base)
    # After the variables that were there: a server whose first variable changes can no longer name its processes.
    environment = {**os.environ, "TMPDIR": folder}
    # What torch compiles is kept among temporary files, and the next server is to find it.
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(usual, f"torchinductor_{os.getuid()}"))
    try:
        yield environment
    finally:
        _unlink_shared_memory(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _unlink_shared_memory(folder: str) -> None:
    """Unlink what vLLM's ranks on a CPU share, which no tracker knows: it is named after the file where they meet."""
    for name in os.listdir(folder):
        if len(name) > _LEAST_UNIQUE:
            for path in Path("/dev/shm").glob(f"{glob.escape(name)}*"):
                with contextlib.suppress(OSError):
                    path.unlink()


def main(grace_s: float, command: list[str]) -> int:
    """Run the command to its end, or to the starter's."""
    starter = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with _own_folder() as environment:
        return _run(starter, grace_s, command, environment)


def _run(starter: int, grace_s: float, command: list[str], environment: dict[str, str]) -> int:
    process = subprocess.Popen(
        command,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=2,
        env=environment,
        preexec_fn=_die_with_guard,
    )
    print(process.pid, flush=True)
    while process.poll() is None and not _starter_is_gone(starter):
        pass
    if process.poll() is None:
        _signal_session(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    status = process.wait()
    _kill_the_rest()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
