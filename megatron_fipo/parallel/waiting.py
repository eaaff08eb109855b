"""Waiting for work that takes anywhere from a second to hours: on a store, with heartbeats, never inside a collective.

A collective gives up after its time-out although the other ranks may be alive, and if one rank fails, the others stay
in it. Here each rank posts "done" or its error on a store, and sends heartbeats while it works; a waiting rank reads
all three.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from types import TracebackType

from torch.distributed import ProcessGroup, Store
from torch.distributed.distributed_c10d import _get_default_store

BEAT_S = 2.0
SILENCE_S = 60.0
"""A rank whose last heartbeat is older than this is taken for dead."""
_POLL_S = (0.01, 0.5)
"""First and longest time between two looks at the store."""

_numbers = itertools.count()


class OtherRankError(RuntimeError):
    """Another rank failed, or fell silent, in work that this one waited for."""


class Work:
    """One piece of work that ranks do at their own pace. Every rank enters it, as a context manager.

        with Work(group, "rollout of step 3", on_failure_elsewhere=engine.abort):
            ...  # what this rank has to do, nothing where it has nothing to do

    Leaving it waits for all ranks. An error inside is told to the others and raised here as it is; there it becomes an
    `OtherRankError`.

    Args:
        group: all ranks of the world.
        name: what the work is, for messages.
        on_failure_elsewhere: called once, from another thread, when another rank has failed while this one works.
        silence_s: how long a rank may be silent.
    """

    def __init__(
        self,
        group: ProcessGroup,
        name: str,
        on_failure_elsewhere: Callable[[], None] | None = None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self._rank, self._size, self._name = group.rank(), group.size(), name
        self._on_failure_elsewhere, self._silence_s = on_failure_elsewhere, silence_s
        self._prefix = f"megatron_fipo/waiting/{next(_numbers)}"
        self._stopped = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Work:
        if self._size > 1:
            self._store: Store = _get_default_store()
            self._store.add(self._key("beats", self._rank), 1)
            self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._beating is None:
            return
        self._stopped.set()
        self._beating.join()
        outcome = "" if error is None else f"{type(error).__name__}: {error}"
        self._store.set(self._key("failed" if error else "done", self._rank), outcome)
        if error is not None:
            self._store.set(self._key("failed"), str(self._rank))
            return
        self._wait_for_all()

    def _beat(self) -> None:
        told = False
        while not self._stopped.wait(BEAT_S):
            self._store.add(self._key("beats", self._rank), 1)
            if not told and self._on_failure_elsewhere is not None and self._store.check([self._key("failed")]):
                told = True
                self._on_failure_elsewhere()

    def _wait_for_all(self) -> None:
        waiting = {rank: (0, time.monotonic()) for rank in range(self._size) if rank != self._rank}
        pause, longest = _POLL_S
        while True:
            if self._store.check([self._key("failed")]):
                rank = int(self._store.get(self._key("failed")))
                reason = self._store.get(self._key("failed", rank)).decode()
                raise OtherRankError(f"{self._name}: rank {rank} failed: {reason}")
            for rank in list(waiting):
                if self._store.check([self._key("done", rank)]):
                    del waiting[rank]
                else:
                    waiting[rank] = self._listen(rank, *waiting[rank])
            if not waiting:
                return
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _listen(self, rank: int, beats: int, heard_at: float) -> tuple[int, float]:
        """(beats of a rank so far, when the last one was heard)."""
        now, count = time.monotonic(), self._store.add(self._key("beats", rank), 0)
        if count != beats:
            return count, now
        if now - heard_at > self._silence_s:
            raise OtherRankError(
                f"{self._name}: rank {rank} has given no sign of life for {self._silence_s:.0f} s; its process or its "
                "machine is dead or hangs. Start the same command again: what was saved and recorded is taken up."
            )
        return beats, heard_at

    def _key(self, what: str, rank: int | None = None) -> str:
        return f"{self._prefix}/{what}" if rank is None else f"{self._prefix}/{what}/{rank}"
