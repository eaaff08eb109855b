"""One rank's words to others, one after the other, over the store: who waits hears a failure as soon as it is told."""

from __future__ import annotations

import itertools
from datetime import timedelta

from torch.distributed import DistStoreError, Store
from torch.distributed.distributed_c10d import _get_default_store

from megatron_fipo.parallel.waiting import OtherRankError

_SAID, _FAILED = "said ", "failed "
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

    def wait(self, timeout_s: float) -> str:
        """Return what was announced.

        Raises:
            OtherRankError: if it will not come, or has not come in time.
        """
        try:
            self._store.wait([self._key], timedelta(seconds=timeout_s))
        except DistStoreError as error:
            raise OtherRankError(f"{self._name}: nothing was heard of it within {timeout_s:.0f} s") from error
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
