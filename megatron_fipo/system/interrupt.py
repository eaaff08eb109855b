"""Ctrl-C and SIGTERM as a request to finish, save and leave."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt:
    """Takes note of the first SIGINT or SIGTERM, which would end the process otherwise; training asks between updates.

    torchrun sends SIGTERM to its processes and kills them 30 s later; a terminal sends SIGINT to all of them at once.

    Args:
        on_signal: called in the signal handler, to end long waits.
    """

    def __init__(self, on_signal: Callable[[], None]) -> None:
        self.received: signal.Signals | None = None
        self._on_signal = on_signal
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        self._previous = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
            self._on_signal()
