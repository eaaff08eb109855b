"""Runs a command and takes care that nothing of it outlives whoever started this.

    python process_guard.py GRACE_S COMMAND ...

The starter holds the other end of this process's standard input. When that closes, or the starter dies in whatever way,
the command's whole session gets SIGTERM, GRACE_S seconds later SIGKILL, and so does what left the session. The
command's process id is the one line on standard output; its own output goes to standard error. The exit status is the
command's, 128 + n after signal n. Standard library only: it runs by path, without this package.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_POLL_S = 0.5


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def _die_with_guard() -> None:
    """In the child before exec: should even this process be killed, the command goes with it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _starter_is_gone(starter: int) -> bool:
    """Wait a moment; True once the input is closed or the parent is another one."""
    readable, _, _ = select.select([0], [], [], _POLL_S)
    return os.getppid() != starter or (bool(readable) and not os.read(0, 1))


def _signal_session(session: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, number)


def _kill_orphans() -> None:
    """Kill and reap what is left: descendants whose parents died have become children of this process."""
    while True:
        children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
        if not children:
            return
        for child in map(int, children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)


def main(grace_s: float, command: list[str]) -> int:
    """Run the command to its end, or to the starter's."""
    starter = os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    process = subprocess.Popen(
        command, start_new_session=True, stdin=subprocess.DEVNULL, stdout=2, preexec_fn=_die_with_guard
    )
    print(process.pid, flush=True)
    while process.poll() is None and not _starter_is_gone(starter):
        pass
    if process.poll() is None:
        _signal_session(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    _signal_session(process.pid, signal.SIGKILL)
    status = process.wait()
    _kill_orphans()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
