"""An event loop in a thread of its own, on which all HTTP of a process's servers runs.

Callers come and go (one `asyncio.run` a step, plain code between them), while servers are watched, restarted and asked
all the time.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class EventLoopThread:
    """Runs coroutines for other threads until it is stopped."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="servers", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start a coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to its end and return what it returned. Not from the loop itself."""
        return self.submit(coroutine).result()

    async def run_here(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await a coroutine from another event loop. Cancelling the awaiting task cancels it."""
        return await asyncio.wrap_future(self.submit(coroutine))

    def call(self, function: Callable[[], T]) -> T:
        """Call a function on the loop and return what it returned. Not from the loop itself."""

        async def call() -> T:
            return function()

        return self.run(call())

    def call_soon(self, function: Callable[[], object]) -> None:
        """Have a function called on the loop. Safe in signal handlers."""
        self._loop.call_soon_threadsafe(function)

    def stop(self) -> None:
        """Cancel what still runs and end the thread."""
        self.run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
