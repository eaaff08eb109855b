"""A pool of processes that judges responses, whatever the verifiers do.

    with VerifierPool(num_workers=2, timeout_s=10.0, verifiers=["math"]) as pool:
        verdict = pool.submit(VerifierJob("math", "Answer: 4", "4", "stop")).result()

A verifier that hangs is killed with its process after `timeout_s`; one that crashes takes only its own process along.
Either way its response gets a verdict with an error, the process is replaced, and the responses behind it are judged as
if nothing had happened. Submission is asynchronous, so that judging overlaps with generation.

Verifiers of one kind (`isolation`) share processes, those of another have their own: what evaluates a model's text has
neither the environment nor the rights of what calls a server. A worker that is killed or slow while it starts is
started again; one that says that its verifiers cannot be used ends the pool.

Responses travel in batches, because a hand-over per response would wait for the interpreter lock, which a thread that
generates holds for milliseconds at a time. Verdicts come back one by one, each with the worker's clock, so that
time-outs stay exact per response.
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
"""Most responses handed to a worker at a time."""

MEMORY_GIB = 8.0
"""Address space of each process, libraries included (about 1 GiB)."""

MAX_START_ATTEMPTS = 8
"""The run is given up after this many starts in a row of a worker that is killed or too slow."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 15.0
"""Pause before a worker is started again, doubled each time: memory and disks take a while to be free again."""


class WorkerStartError(RuntimeError):
    """No worker could be started, though another time might do: it was killed or too slow each time."""


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
            num_workers: processes that judge at a time; each kind of verifier has as many.
            timeout_s: longest time for one response.
            verifiers: names to import at the start; one that comes later has its workers started again.
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
        """Wait until the verifiers named at the start can judge; without a call, the first response finds out.

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
        """Queue one response; see `submit_all`."""
        return self.submit_all([job])[0]

    def submit_all(self, jobs: Iterable[VerifierJob]) -> list[Future[Verdict]]:
        """Queue responses; their futures, in the same order.

        A future gives a verdict, with an error where the verifier failed. It raises VerifierUnavailableError if a
        verifier cannot be used (its package is missing), WorkerStartError if no worker lives long enough to start, and
        RuntimeError if the pool is closed first. Cancelling it takes effect until a worker has the response.

        Raises:
            ValueError: for an unknown verifier.
            RuntimeError: if the pool is closed, or its workers could not start; as the futures.
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
        """Judge one response from an event loop; raises as its future does."""
        return await asyncio.wrap_future(self.submit(job))

    def judge_all(self, jobs: Iterable[VerifierJob]) -> list[Verdict]:
        """Judge responses and wait; verdicts in order, raises as their futures do."""
        return [future.result() for future in self.submit_all(jobs)]

    def close(self) -> None:
        """Kill the workers; responses not judged yet raise RuntimeError from their futures. May be called again."""
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
        """Have workers import a verifier from now on; its kind. The caller holds the lock, or is alone."""
        isolation = isolation_of(name, self._trusted)
        known = self._verifiers.get(isolation, ())
        if name not in known:
            self._verifiers[isolation] = (*known, name)
        return isolation

    def _shut(self, reason: RuntimeError) -> None:
        """Refuse further work, fail what is queued, and wake the threads, which fail what they have in hand."""
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
        """One thread: keeps a worker of each kind alive and feeds one at a time until the pool is shut."""
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
            # Still open only if something failed that should not: the thread's traceback follows, and nobody may wait.
            self._shut(RuntimeError("a thread of the verifier pool failed; its traceback is on standard error"))
            for isolation in list(workers):
                _discard(workers, isolation)
            self._abandon(batch)

    def _start_missing(self, workers: dict[Isolation, WorkerProcess]) -> None:
        """Start a worker of each kind that has verifiers, all at once, and wait for them.

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
            f"a verifier's worker was started {MAX_START_ATTEMPTS} times and did not live to judge; last, {failure}. "
            "Look at the machine's memory and disks; the same command goes on where this run stopped"
        )

    def _pause(self, seconds: float) -> None:
        """Wait, unless the pool is shut meanwhile: then raises WokenError."""
        if select.select([self._wake_read_fd], [], [], seconds)[0]:
            raise WokenError

    def _next_batch(self) -> deque[_Pending]:
        """Take a fair share of the queue that has waited longest, waiting for one; empty when the pool is shut."""
        with self._changed:
            self._changed.wait_for(lambda: any(self._queues.values()) or self._closed_because is not None)
            if self._closed_because is not None:
                return deque()
            queue = min(filter(None, self._queues.values()), key=lambda queue: queue[0].order)
            # Half a share at a time leaves something for whoever is done first.
            size = min(MAX_BATCH_SIZE, -(-len(queue) // (2 * self._num_workers)))
            taken = [queue.popleft() for _ in range(size)]
        return deque(item for item in taken if item.future.set_running_or_notify_cancel())

    def _judge(self, worker: WorkerProcess, batch: deque[_Pending]) -> bool:
        """Have a batch judged, taking items off as their verdicts come; False if the worker is of no more use.

        What is left in the batch then was not reached and is judged by the next worker.
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
    """The same error for another future: each keeps a traceback of its own."""
    return type(reason)(*reason.args)


def _discard(workers: dict[Isolation, WorkerProcess], isolation: Isolation) -> None:
    worker = workers.pop(isolation, None)
    if worker is not None:
        worker.kill()
