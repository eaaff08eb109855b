"""A pool of processes that judges responses, whatever the verifiers do.

    with VerifierPool(num_workers=2, timeout_s=10.0, verifiers=["math"]) as pool:
        verdict = pool.submit(VerifierJob("math", "Answer: 4", "4", "stop")).result()

A verifier that hangs is killed with its process after `timeout_s`; one that crashes takes only its own process along.
Either way its response gets a verdict with an error, the process is replaced, and the responses behind it are judged as
if nothing had happened. Submission is asynchronous, so that judging overlaps with generation.

Responses travel in batches, because a hand-over per response would wait for the interpreter lock, which a thread that
generates holds for milliseconds at a time. Verdicts come back one by one, each with the worker's clock, so that
time-outs stay exact per response.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from megatron_fipo.rl.verifiers.registry import check_verifier_name
from megatron_fipo.rl.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.rl.verifiers.worker_process import (
    WokenError,
    WorkerDiedError,
    WorkerProcess,
    WorkerStartError,
    WorkerTimeoutError,
)

MAX_BATCH_SIZE = 64
"""Most responses handed to a worker at a time."""


@dataclass
class _Pending:
    verifier: str
    pickled: bytes
    future: Future[Verdict]


class VerifierPool:
    """Processes that judge responses; safe to use from several threads and from an event loop."""

    def __init__(
        self, num_workers: int = 1, timeout_s: float = 10.0, memory_gib: float = 8.0, verifiers: Sequence[str] = ()
    ) -> None:
        """Start the workers in the background.

        Args:
            num_workers: processes.
            timeout_s: longest time for one response.
            memory_gib: address space of each process, libraries included (about 1 GiB).
            verifiers: names to import at the start; the time of an import that happens later counts as the response's.

        Raises:
            ValueError: for an unknown verifier, or a number that is not positive.
        """
        numbers = {"verifier.num_workers": num_workers, "verifier.timeout_s": timeout_s, "memory_gib": memory_gib}
        for name, value in numbers.items():
            if not value > 0:
                raise ValueError(f"{name} is positive, got {value}")
        for verifier in verifiers:
            check_verifier_name(verifier)
        self._verifiers = tuple(verifiers)
        self._timeout_s = timeout_s
        self._memory_gib = memory_gib
        self._num_workers = num_workers
        self._queue: deque[_Pending] = deque()
        self._changed = threading.Condition()
        self._closed_because: str | None = None
        self._wake_read_fd, self._wake_write_fd = os.pipe()
        self._threads = [
            threading.Thread(target=self._run, name=f"verifier-pool-{index}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: VerifierJob) -> Future[Verdict]:
        """Queue one response; see `submit_all`."""
        return self.submit_all([job])[0]

    def submit_all(self, jobs: Iterable[VerifierJob]) -> list[Future[Verdict]]:
        """Queue responses; their futures, in the same order.

        A future gives a verdict, with an error where the verifier failed. It raises RuntimeError if the workers cannot
        start (a verifier's package is missing) or the pool is closed first. Cancelling it takes effect until a worker
        has the response.

        Raises:
            ValueError: for an unknown verifier.
            RuntimeError: if the pool is closed, or its workers could not start.
            pickle.PicklingError: for a reference that cannot be pickled.
        """
        pending = []
        for job in jobs:
            check_verifier_name(job.verifier)
            pending.append(_Pending(job.verifier, pickle.dumps(job), Future()))
        with self._changed:
            if self._closed_because is not None:
                raise RuntimeError(self._closed_because)
            self._queue.extend(pending)
            self._changed.notify_all()
        return [item.future for item in pending]

    async def judge(self, job: VerifierJob) -> Verdict:
        """Judge one response from an event loop; raises as its future does."""
        return await asyncio.wrap_future(self.submit(job))

    def judge_all(self, jobs: Iterable[VerifierJob]) -> list[Verdict]:
        """Judge responses and wait; verdicts in order, raises as their futures do."""
        return [future.result() for future in self.submit_all(jobs)]

    def close(self) -> None:
        """Kill the workers; responses not judged yet raise RuntimeError from their futures. May be called again."""
        self._shut("the verifier pool is closed")
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        if self._wake_read_fd >= 0:
            os.close(self._wake_read_fd)
            os.close(self._wake_write_fd)
            self._wake_read_fd = self._wake_write_fd = -1

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _shut(self, reason: str) -> None:
        """Refuse further work, fail what is queued, and wake the threads, which fail what they have in hand."""
        with self._changed:
            if self._closed_because is not None:
                return
            self._closed_because = reason
            abandoned = list(self._queue)
            self._queue.clear()
            os.write(self._wake_write_fd, b"!")
            self._changed.notify_all()
        self._abandon(abandoned)

    def _abandon(self, pending: Iterable[_Pending]) -> None:
        for item in pending:
            if item.future.running() or item.future.set_running_or_notify_cancel():
                item.future.set_exception(RuntimeError(self._closed_because))

    def _run(self) -> None:
        """One thread: keeps one worker alive and feeds it until the pool is shut."""
        worker: WorkerProcess | None = None
        batch: deque[_Pending] = deque()
        try:
            while self._closed_because is None:
                if worker is None:
                    worker = WorkerProcess(self._verifiers, self._timeout_s, self._memory_gib, self._wake_read_fd)
                    worker.wait_until_ready()
                batch = batch or self._next_batch()
                if batch and not self._judge(worker, batch):
                    worker.kill()
                    worker = None
        except WokenError:
            pass
        except WorkerStartError as error:
            self._shut(str(error))
        finally:
            # Still open only if something failed that should not: the thread's traceback follows, and nobody may wait.
            self._shut("a thread of the verifier pool failed; its traceback is on standard error")
            if worker is not None:
                worker.kill()
            self._abandon(batch)

    def _next_batch(self) -> deque[_Pending]:
        """Take a fair share of the queue, waiting for one; empty when the pool is shut."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed_because is not None)
            # Half a share at a time leaves something for whoever is done first.
            size = min(MAX_BATCH_SIZE, -(-len(self._queue) // (2 * self._num_workers)))
            taken = [self._queue.popleft() for _ in range(size)]
        return deque(item for item in taken if item.future.set_running_or_notify_cancel())

    def _judge(self, worker: WorkerProcess, batch: deque[_Pending]) -> bool:
        """Have a batch judged, taking items off as their verdicts come; False if the worker is of no more use.

        What is left in the batch then was not reached and is judged by the next worker.
        """
        try:
            worker.send([item.pickled for item in batch])
        except WorkerDiedError:
            return False
        while batch:
            error = ""
            try:
                verdict = worker.receive()
            except WorkerTimeoutError:
                error = f"took longer than verifier.timeout_s={self._timeout_s:g} and was killed"
            except WorkerDiedError as death:
                error = f"ended its process ({death})"
            if error:
                verdict = Verdict(0.0, error=f"verifier {batch[0].verifier} {error}")
            batch.popleft().future.set_result(verdict)
            if error:
                return False
        return True
