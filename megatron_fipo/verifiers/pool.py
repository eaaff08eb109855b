"""A pool of processes that judges responses and survives whatever the verifiers do.

    with VerifierPool(num_workers=2, timeout_s=10.0, verifiers=["math"]) as pool:
        verdict = pool.submit(VerifierJob("math", "Answer: 4", "4", "stop")).result()

A verifier that hangs is killed with its process after `timeout_s`; a crash ends only the verifier's own process. In
both cases the response gets a verdict with an error, the process is replaced, and the following responses are judged
as usual. Submission is asynchronous, so that judging overlaps with generation.

Verifiers of one kind (`isolation`) share processes, and each kind has its own: a verifier that evaluates a model's text
has neither the environment nor the rights of one that calls a server. A worker that is killed or too slow during its
start is started again; a worker that reports that its verifiers cannot be used ends the pool.

Responses are sent in batches, because sending each one would wait for the interpreter lock, which a thread that
generates holds for milliseconds at a time. Verdicts come back one by one, each with the worker's clock, so that every
response has its exact time-out.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import pickle
import select
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from megatron_fipo.config import require_verifier_name
from megatron_fipo.system.text_hygiene import clean_text
from megatron_fipo.verifiers.isolation import Isolation, WorkerSetup, isolation_of
from megatron_fipo.verifiers.registry import shown_name
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.verifiers.wire import MalformedMessageError
from megatron_fipo.verifiers.worker_process import (
    VerifierUnavailableError,
    WokenError,
    WorkerDiedError,
    WorkerProcess,
    WorkerTimeoutError,
)

MAX_BATCH_SIZE = 64
"""Largest number of responses in one batch for a worker."""

MEMORY_GIB = 8.0
"""Largest address space of a worker, in GiB; its libraries take about 1 GiB of it."""

MAX_START_ATTEMPTS = 8
"""The pool gives up after this many failed starts of its workers in a row."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
"""Pauses in seconds before a worker is started again, doubled each time until memory and disks are free again."""


class WorkerStartError(RuntimeError):
    """No worker could be started: it was killed or too slow each time. A later run may succeed."""


@dataclass
class _Pending:
    order: int
    verifier: str
    pickled: bytes
    future: Future[Verdict]


class VerifierPool:
    """Processes that judge responses; safe to use from several threads and from an event loop."""

    def __init__(
        self,
        num_workers: int = 1,
        timeout_s: float = 10.0,
        verifiers: Sequence[str] = (),
        trusted: Sequence[str] = (),
    ) -> None:
        """Start the workers in the background.

        Args:
            num_workers: number of processes that judge at a time, and of processes for each kind of verifier.
            timeout_s: longest time for one response.
            verifiers: names to import at the start; a name that comes later restarts the workers of its kind.
            trusted: names of verifiers that run with the trainer's environment and rights.

        Raises:
            ValueError: for an unknown verifier, or a number that is not positive.
        """
        for name, value in {"verifier.num_workers": num_workers, "verifier.timeout_s": timeout_s}.items():
            if not value > 0:
                raise ValueError(f"{name} is positive, got {value}")
        self._trusted = frozenset(trusted)
        self._verifiers: dict[Isolation, tuple[str, ...]] = {}
        self._queues: dict[Isolation, deque[_Pending]] = {isolation: deque() for isolation in Isolation}
        for verifier in verifiers:
            require_verifier_name(verifier)
            self._add_verifier(verifier)
        self._timeout_s = timeout_s
        self._num_workers = num_workers
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._closed_because: RuntimeError | None = None
        self._num_ready = 0
        self._wake_read_fd, self._wake_write_fd = os.pipe()
        self._threads = [
            threading.Thread(target=self._run, name=f"verifier-pool-{index}", daemon=True)
            for index in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def wait_until_ready(self) -> None:
        """Wait until the verifiers named at the start can judge. Optional: submitting reports the same errors.

        Raises:
            VerifierUnavailableError: if one of them cannot be used.
            WorkerStartError: if a worker was killed or too slow every time.
            RuntimeError: if the pool is closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._num_ready == self._num_workers or self._closed_because is not None)
            if self._closed_because is not None:
                raise _again(self._closed_because)

    def submit(self, job: VerifierJob) -> Future[Verdict]:
        """Queue one response, as `submit_all` does."""
        return self.submit_all([job])[0]

    def submit_all(self, jobs: Iterable[VerifierJob]) -> list[Future[Verdict]]:
        """Queue responses and return their futures, in the same order.

        A future gives a verdict, with an error where the verifier failed. It raises VerifierUnavailableError if a
        verifier cannot be used (its package is missing, say), WorkerStartError if no worker could be started, and
        RuntimeError if the pool is closed first. It can be cancelled until a worker's thread takes the response.

        Raises:
            ValueError: for an unknown verifier.
            RuntimeError: if the pool is closed or has failed: the same error as the futures'.
            pickle.PicklingError: for a reference that cannot be pickled.
        """
        pending = []
        for job in jobs:
            require_verifier_name(job.verifier)
            pending.append(_Pending(next(self._order), job.verifier, pickle.dumps(job), Future()))
        with self._changed:
            if self._closed_because is not None:
                raise _again(self._closed_because)
            for item in pending:
                self._queues[self._add_verifier(item.verifier)].append(item)
            self._changed.notify_all()
        return [item.future for item in pending]

    async def judge(self, job: VerifierJob) -> Verdict:
        """Judge one response from an event loop; raises what its future raises."""
        return await asyncio.wrap_future(self.submit(job))

    def judge_all(self, jobs: Iterable[VerifierJob]) -> list[Verdict]:
        """Judge responses and return their verdicts in order; raises what their futures raise."""
        return [future.result() for future in self.submit_all(jobs)]

    def close(self) -> None:
        """Kill the workers; futures of responses not judged yet raise RuntimeError. May be called more than once."""
        self._shut(RuntimeError("the verifier pool is closed"))
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

    def _add_verifier(self, name: str) -> Isolation:
        """Add a verifier to those that workers import; returns its kind. The caller holds the lock, or is __init__."""
        isolation = isolation_of(name, self._trusted)
        known = self._verifiers.get(isolation, ())
        if name not in known:
            self._verifiers[isolation] = (*known, name)
        return isolation

    def _shut(self, reason: RuntimeError) -> None:
        """Refuse further jobs, fail the queued ones, and wake the threads, which fail the jobs of their batch."""
        with self._changed:
            if self._closed_because is not None:
                return
            self._closed_because = reason
            abandoned = [item for queue in self._queues.values() for item in queue]
            for queue in self._queues.values():
                queue.clear()
            os.write(self._wake_write_fd, b"!")
            self._changed.notify_all()
        self._abandon(abandoned)

    def _abandon(self, pending: Iterable[_Pending]) -> None:
        assert self._closed_because is not None
        for item in pending:
            if item.future.running() or item.future.set_running_or_notify_cancel():
                item.future.set_exception(_again(self._closed_because))

    def _run(self) -> None:
        """Body of one thread: keep a worker of each kind alive and feed one at a time until the pool is shut."""
        workers: dict[Isolation, WorkerProcess] = {}
        batch: deque[_Pending] = deque()
        try:
            self._start_missing(workers)
            with self._changed:
                self._num_ready += 1
                self._changed.notify_all()
            while self._closed_because is None:
                self._start_missing(workers)
                batch = batch or self._next_batch()
                if not batch:
                    continue
                isolation = isolation_of(batch[0].verifier, self._trusted)
                worker = workers.get(isolation)
                known = worker.setup.verifiers if worker is not None else ()
                if (
                    worker is None
                    or any(item.verifier not in known for item in batch)
                    or not self._judge(worker, batch)
                ):
                    _discard(workers, isolation)
        except WokenError:
            pass
        except (VerifierUnavailableError, WorkerStartError) as error:
            self._shut(error)
        finally:
            # The pool is still open here only after an unforeseen error, whose traceback follows; no future may hang.
            self._shut(RuntimeError("a thread of the verifier pool failed; its traceback is on standard error"))
            for isolation in list(workers):
                _discard(workers, isolation)
            self._abandon(batch)

    def _start_missing(self, workers: dict[Isolation, WorkerProcess]) -> None:
        """Start the missing worker of each kind that has verifiers, all at the same time, and wait for them.

        Raises:
            VerifierUnavailableError: if a verifier cannot be used.
            WorkerStartError: if a worker was killed or too slow every time.
            WokenError: if the pool was shut.
        """
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, MAX_START_ATTEMPTS + 1):
            with self._changed:
                missing = {kind: names for kind, names in self._verifiers.items() if kind not in workers}
            for kind, names in missing.items():
                setup = WorkerSetup(names, kind, self._timeout_s, MEMORY_GIB)
                workers[kind] = WorkerProcess(setup, self._wake_read_fd)
            failure = ""
            for kind in missing:
                try:
                    workers[kind].wait_until_ready()
                except (WorkerDiedError, WorkerTimeoutError, MalformedMessageError) as error:
                    failure = f"the worker of {', '.join(missing[kind])}: {error or 'it took too long'}"
                    _discard(workers, kind)
            if not failure:
                return
            if attempt < MAX_START_ATTEMPTS:
                self._pause(pause_s)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise WorkerStartError(
            f"a verifier's worker was started {MAX_START_ATTEMPTS} times and never became ready; the last failure: "
            f"{failure}. Look at the machine's memory and disks; the same command resumes this run"
        )

    def _pause(self, seconds: float) -> None:
        """Wait; raises WokenError if the pool is shut meanwhile."""
        if select.select([self._wake_read_fd], [], [], seconds)[0]:
            raise WokenError

    def _next_batch(self) -> deque[_Pending]:
        """Wait for jobs, and take a share of the queue whose first job is the oldest; empty when the pool is shut."""
        with self._changed:
            self._changed.wait_for(lambda: any(self._queues.values()) or self._closed_because is not None)
            if self._closed_because is not None:
                return deque()
            queue = min(filter(None, self._queues.values()), key=lambda queue: queue[0].order)
            # Half of this thread's share leaves jobs for the thread that finishes first.
            size = min(MAX_BATCH_SIZE, -(-len(queue) // (2 * self._num_workers)))
            taken = [queue.popleft() for _ in range(size)]
        return deque(item for item in taken if item.future.set_running_or_notify_cancel())

    def _judge(self, worker: WorkerProcess, batch: deque[_Pending]) -> bool:
        """Judge a batch, removing items as their verdicts arrive; False if the worker must be replaced.

        Items that are then left in the batch were not judged, and go to the next worker.
        """
        try:
            worker.send([(item.verifier, item.pickled) for item in batch])
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
            except MalformedMessageError as malformed:
                error = f"answered with {malformed}"
            if error:
                verdict = Verdict(0.0, error=clean_text(f"verifier {shown_name(batch[0].verifier)} {error}"))
            batch.popleft().future.set_result(verdict)
            if error:
                return False
        return True


def _again(reason: RuntimeError) -> RuntimeError:
    """A copy of an error for another future, so that each has its own traceback."""
    return type(reason)(*reason.args)


def _discard(workers: dict[Isolation, WorkerProcess], isolation: Isolation) -> None:
    worker = workers.pop(isolation, None)
    if worker is not None:
        worker.kill()
