"""Work that is handed to one thread: it is done in order, whoever hands it over goes on, and no failure is lost."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


class Backlog:
    """Does jobs one after the other. Its methods are called by one thread, which is not the one that does them.

    Args:
        name: the thread's.
        executor: does the jobs in order, one at a time; None takes a thread of its own. Tests replace it.
    """

    def __init__(self, name: str, executor: Executor | None = None) -> None:
        self._executor = ThreadPoolExecutor(1, name) if executor is None else executor
        self._last: Future[None] | None = None
        self.failure: Exception | None = None
        """What the first job failed with that has failed since `take_failure`. Jobs may read it."""

    def add(self, job: Callable[[], T]) -> Future[T]:
        """Have a job done after those that were added before. What becomes of it cannot be cancelled."""
        # Not the executor's own future: a task that waited for that one would cancel the job as it is cancelled itself.
        done: Future[T] = Future()
        done.set_running_or_notify_cancel()
        self._last = self._executor.submit(self._do, job, done)
        return done

    def take_failure(self) -> Exception | None:
        """Wait until all jobs are done; what the first of them failed with, which is forgotten with this."""
        if self._last is not None:
            wait([self._last])
        failure, self.failure = self.failure, None
        return failure

    def forget(self, failure: BaseException) -> None:
        """Do not return this failure from `take_failure`: it has been raised already."""
        if self.failure is failure:
            self.failure = None

    def close(self) -> Exception | None:
        """Wait until all jobs are done, end the thread, and return what `take_failure` does."""
        self._executor.shutdown()
        return self.take_failure()

    def _do(self, job: Callable[[], T], done: Future[T]) -> None:
        try:
            result = job()
        except Exception as error:  # noqa: BLE001 - nobody else would hear of it
            if self.failure is None:
                self.failure = error
            done.set_exception(error)
        else:
            done.set_result(result)
