"""A limit on the CPU time of a block of Python code, for computations that may go on for ever."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_REPEAT_S = 0.2
"""The signal comes again and again, in case the code swallows the exception."""


class CpuLimitError(BaseException):
    """The limit was reached. No Exception, so that a library's `except Exception` does not swallow it."""


@contextlib.contextmanager
def cpu_limit(limit_s: float) -> Iterator[None]:
    """Raise CpuLimitError inside the block once it took so much CPU time of this process.

    Works where signals do, in the main thread, between two instructions of Python: one call into C that never returns
    is not interrupted. In any other thread there is no limit. Nesting is not supported.

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
