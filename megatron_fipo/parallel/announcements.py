"""One rank's words to others, one after the other, over the store: who waits hears a failure as soon as it is told."""

from __future__ import annotations

import itertools
import threading
import time

from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

from megatron_fipo.parallel.waiting import OtherRankError

_SAID, _FAILED = "said ", "failed "
_POLL_S = 0.1
_numbers = itertools.count()


class Announcements:
    """The same object on the rank that speaks and on those that listen; each of them makes it as the n-th of its kind.

    Args:
        name: what is announced, for messages.
        store: the store to use; None takes torch.distributed's.
    """

    def __init__(self, name: str, store: Store | None = None) -> None:
        self._name = name
        self._store = _get_default_store() if store is None else store
        self._prefix = f"megatron_fipo/announcements/{next(_numbers)}"
        self._number = 0
        self._is_open = False

    def begin(self) -> None:
        """Go on to the next one; every rank does so as often."""
        self._number, self._is_open = self._number + 1, True

    def tell(self, word: str) -> None:
        """Say it."""
        self._set(_SAID + word)

    def fail(self, reason: str) -> None:
        """Say that it will not come; nothing where it was said already."""
        if self._is_open:
            self._set(_FAILED + reason)

    def wait(self, timeout_s: float, stopped: threading.Event | None = None) -> str:
        """Return what was announced.

        The store is asked again and again: a wait inside it would keep this rank's other threads from the store, and
        with them its heartbeats.

        Args:
            stopped: ends the wait, from another thread.

        Raises:
            OtherRankError: if it will not come, has not come in time, or the wait was ended.
        """
        stopped = threading.Event() if stopped is None else stopped
        deadline = time.monotonic() + timeout_s
        while not self._store.check([self._key]):
            if time.monotonic() > deadline:
                raise OtherRankError(f"{self._name}: nothing was heard of it within {timeout_s:.0f} s")
            if stopped.wait(_POLL_S):
                raise OtherRankError(f"{self._name}: nobody here waits for it any more")
        answer = self._store.get(self._key).decode()
        if answer.startswith(_FAILED):
            raise OtherRankError(f"{self._name}: {answer.removeprefix(_FAILED)}")
        return answer.removeprefix(_SAID)

    @property
    def _key(self) -> str:
        return f"{self._prefix}/{self._number}"

    def _set(self, text: str) -> None:
        assert self._is_open, "begin() comes first, and one word is said of each"
        self._is_open = False
        self._store.set(self._key, text)
