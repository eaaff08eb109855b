"""Running a coroutine to its end from code that is not asynchronous, in a notebook too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from typing import Any, Generic, TypeVar

Result = TypeVar("Result")

_LOOKS_EVERY_S = 0.2
"""A signal that comes at the moment when a thread falls asleep on a lock does not wake it, so none sleeps for long."""


def run_to_end(coroutine: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end; returns what it returns, raises what it raises.

    In a notebook the calling thread runs an event loop already, inside which no other can run: there the coroutine gets
    a thread of its own, and the caller waits for it. A KeyboardInterrupt of the waiting caller cancels the coroutine.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    # It begins when it is waited for: a KeyboardInterrupt before that would leave it running.
    may_begin: Future[None] = Future()

    async def begun() -> Result:
        await asyncio.wrap_future(may_begin)
        return await coroutine

    def let_begin() -> None:
        if not may_begin.done():
            may_begin.set_result(None)

    return InBackground(begun(), "coroutine-of-a-notebook").result(let_begin)


class InBackground(Generic[Result]):
    """A coroutine that runs in a thread of its own, on an event loop of its own, from now on."""

    def __init__(self, coroutine: Coroutine[Any, Any, Result], name: str) -> None:
        """
        Args:
            name: the thread's.
        """
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._future: Future[Result] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def result(self, while_waiting: Callable[[], None] = lambda: None) -> Result:
        """Wait for its end, and release the thread; what the coroutine returns or raises. Call it once.

        A KeyboardInterrupt meanwhile cancels the coroutine.

        Args:
            while_waiting: called at once, and now and then.
        """
        try:
            while_waiting()
            while not wait([self._future], timeout=_LOOKS_EVERY_S).done:
                while_waiting()
            return self._future.result()
        finally:
            asyncio.run_coroutine_threadsafe(_settle(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


async def _settle() -> None:
    """Cancel and await the tasks that the coroutine left behind, and the coroutine itself if it was interrupted."""
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
