"""Running a coroutine to its end from code that is not asynchronous, in a notebook too."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future, wait
from typing import Any, TypeVar

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
    return _run_in_thread(coroutine)


def _run_in_thread(coroutine: Coroutine[Any, Any, Result]) -> Result:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="coroutine-of-a-notebook", daemon=True)
    thread.start()
    future: Future[Result]
    try:  # an interrupt may come as soon as the coroutine runs, before there is a future to cancel
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        while not wait([future], timeout=_LOOKS_EVERY_S).done:
            pass
        return future.result()
    finally:
        asyncio.run_coroutine_threadsafe(_settle(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _settle() -> None:
    """Cancel and await the tasks that the coroutine left behind, and the coroutine itself if it was interrupted."""
    rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
