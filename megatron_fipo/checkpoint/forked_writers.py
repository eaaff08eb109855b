"""Forked processes that end with the process that forked them.

Megatron-Core forks the processes that write checkpoints. A writer whose rank is killed can wait for ever for the other
side of its queue, and it holds all that the rank had open: memory of the GPU, files, and the pipes by whose end the
rank's other children learn that it is gone. On Linux the kernel is told to kill it; elsewhere nothing changes.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_fipo.system.parent_death import signal_when_parent_ends

_is_tying = False
_parent = 0


@contextmanager
def ended_with_their_parent() -> Iterator[None]:
    """Processes that the calling thread forks inside are killed when that thread ends, and so are those they fork.

    Processes that are started by exec, as `subprocess` does, are not affected.
    """
    global _is_tying
    before, _is_tying = _is_tying, True
    try:
        yield
    finally:
        _is_tying = before


def _note_parent() -> None:
    global _parent
    _parent = os.getpid()


def _tie() -> None:
    if _is_tying:
        signal_when_parent_ends(signal.SIGKILL, _parent)


if sys.platform == "linux":
    os.register_at_fork(before=_note_parent, after_in_child=_tie)
