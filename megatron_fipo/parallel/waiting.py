"""Waiting for work that takes anywhere from a second to hours: on a store, with heartbeats, never inside a collective.

A collective gives up after its time-out although the other ranks may be alive, and if one rank fails, the others stay
in it. Here ranks that are done count themselves, a rank that fails posts its error, and all ranks send heartbeats until
the last one is done. Each rank listens to one other, the one before it, and posts when that one falls silent.

What this costs the store does not depend on how many ranks wait for how many others: a waiting rank reads two keys at a
look, and every rank adds to one key and reads two every `BEAT_S` seconds.
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
        self._is_working, self._stopped = True, threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Work:
        if self._size > 1:
            self._store: Store = _get_default_store()
            self._store.add(self._beats(self._rank), 1)
            self._beating = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._beating is None:
            return
        self._is_working = False
        try:
            if error is None:
                self._store.add(self._key("done"), 1)
                self._wait_for_all()
            else:
                self._post(f"rank {self._rank} failed: {type(error).__name__}: {error}")
        finally:
            self._stopped.set()
            self._beating.join()

    def _beat(self) -> None:
        """Send heartbeats, listen to the rank before this one, and tell this rank of a failure while it works."""
        before = (self._rank - 1) % self._size
        told, beats, heard_at = False, 0, time.monotonic()
        while not self._stopped.wait(BEAT_S):
            self._store.add(self._beats(self._rank), 1)
            now, count = time.monotonic(), self._store.add(self._beats(before), 0)
            if count != beats:
                beats, heard_at = count, now
            elif now - heard_at > self._silence_s:
                self._post(self._silence_of(before))
            if not told and self._store.check([self._key("failed")]):
                told = True
                if self._is_working and self._on_failure_elsewhere is not None:
                    self._on_failure_elsewhere()

    def _wait_for_all(self) -> None:
        pause, longest = _POLL_S
        while self._store.add(self._key("done"), 0) < self._size:
            if self._store.check([self._key("failed")]):
                raise OtherRankError(f"{self._name}: {self._store.get(self._key('failed')).decode()}")
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _post(self, failure: str) -> None:
        """Tell all ranks, unless another failure came first."""
        self._store.compare_set(self._key("failed"), "", failure)

    def _silence_of(self, rank: int) -> str:
        return (
            f"rank {rank} has given no sign of life for {self._silence_s:.0f} s; its process or its machine is dead or "
            "hangs. Start the same command again: what was saved and recorded is taken up."
        )

    def _beats(self, rank: int) -> str:
        return self._key(f"beats/{rank}")

    def _key(self, what: str) -> str:
        return f"{self._prefix}/{what}"
