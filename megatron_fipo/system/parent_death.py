"""A signal from the kernel to a process whose parent has ended.

Two programs do this by themselves, because they run outside this package: `rollout/servers/process_guard.py` and
`verifiers/sandbox_child.py`, both of which import the standard library alone.
"""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def signal_when_parent_ends(number: signal.Signals, parent: int | None = None) -> None:
    """Have the kernel send this process a signal when the thread that started it ends. Linux only.

    Args:
        number: the signal.
        parent: the parent's process id, if it is known. A parent that ended before this call would never be noticed:
            where another process has taken its place, the signal is sent at once.

    Raises:
        OSError: if the kernel refuses.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "PR_SET_PDEATHSIG failed")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), number)
