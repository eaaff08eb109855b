"""A limit on the CPU time of a block of Python code, for computations that may not end."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_REPEAT_S = 0.2
"""Seconds of CPU time after which the signal is repeated, in case the code swallowed the exception."""


class CpuLimitError(BaseException):
    """The limit was reached. It is no Exception, so that a library's `except Exception` does not swallow it."""


@contextlib.contextmanager
def cpu_limit(limit_s: float) -> Iterator[None]:
    """Raise CpuLimitError inside the block once this process has spent `limit_s` seconds of CPU time in it.

    It uses a signal, which Python handles in the main thread between two instructions: a call into C that never returns
    is not interrupted. In other threads there is no limit. Nesting is not supported.

    Raises:
        CpuLimitError: at the limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def interrupt(signum: int, frame: FrameType | None) -> None:
        if armed:
            raise CpuLimitError

    before = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, limit_s, _REPEAT_S)
        yield
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0)
        signal.signal(signal.SIGVTALRM, before)
