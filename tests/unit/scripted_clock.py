"""An event loop whose time is scripted: minutes take milliseconds, and what would wait for ever is an error.

The clock jumps to the next time-out as soon as everything waits. Where everything waits and nothing will ever happen,
`HangError` is raised instead.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from megatron_fipo.rollout.servers.event_loop import EventLoopThread

T = TypeVar("T")

_THREAD_S = 0.5
"""What was given to another thread takes so long."""


class HangError(Exception):
    """Everything waits, and nothing will end it."""


class _JumpingSelector(selectors.SelectSelector):
    now = 1000.0
    horizon = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        found = super().select(0)
        if found or (timeout is not None and timeout <= 0):
            return found
        if timeout is None:
            raise HangError("everything waits, and there is no time-out")
        self.now += timeout
        if self.now > self.horizon:
            raise HangError("everything has waited for hours")
        return []


class ScriptedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only when everything that runs on it waits."""

    def __init__(self) -> None:
        self._clock = _JumpingSelector()
        super().__init__(self._clock)
        # Tests look at what comes of tasks; and Python 3.11 fails if one error is formatted while another one is.
        self.set_exception_handler(lambda loop, context: None)

    def time(self) -> float:
        return self._clock.now

    def drive(self, awaitable: Awaitable[T], within_s: float = 3600.0) -> T:
        """Run until something is there, however much time that takes on this clock."""
        self._clock.horizon = self._clock.now + within_s
        return self.run_until_complete(awaitable)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        """What another thread would do, a while later; like there it is done even where nobody waits any more."""
        future = self.create_future()

        def finish() -> None:
            try:
                result = func(*args)
            except (OSError, RuntimeError, AssertionError) as error:
                if not future.done():
                    future.set_exception(error)
                return
            if not future.done():
                future.set_result(result)

        self.call_later(_THREAD_S, finish)
        return future


class _Driven(concurrent.futures.Future[T]):
    """Waiting for it drives the loop."""

    def __init__(self, loop: ScriptedLoop, task: asyncio.Task[T]) -> None:
        super().__init__()
        self._loop, self._task = loop, task

    def done(self) -> bool:
        return self._task.done()

    def result(self, timeout: float | None = None) -> T:
        if not self._task.done():
            self._loop.drive(asyncio.wait([self._task]))
        return self._task.result()


class DrivenLoop(EventLoopThread):
    """The scripted loop in the place of a thread's: whoever waits for it drives it."""

    def __init__(self, loop: ScriptedLoop) -> None:
        self.loop = loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return _Driven(self.loop, self.loop.create_task(coroutine))

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.submit(coroutine).result()

    async def run_here(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await self.loop.create_task(coroutine)

    def call(self, function: Callable[[], T]) -> T:
        return function()

    def call_soon(self, function: Callable[[], object]) -> None:
        self.loop.call_soon(function)

    def stop(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.drive(asyncio.gather(*tasks, return_exceptions=True) if tasks else asyncio.sleep(0))
