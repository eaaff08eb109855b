"""Work that ranks take piece by piece, in one order, until rank 0 has heard enough. Over the store; no collective."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable

from torch.distributed import Store
from torch.distributed.distributed_c10d import _get_default_store

_numbers = itertools.count()
_ABOUT_TICKET, _ABOUT_OTHERS = b"1", b"0"
"""First byte of a word on its way."""


class OrderedWork:
    """Tickets 0, 1, 2, … of one piece of work, and words about them to rank 0. Every rank makes it as the n-th one.

    Args:
        worker: this rank's number among those that take tickets; None if it takes none. Rank 0 is worker 0.
        num_workers: how many there are. A single one needs no store.
        num_tickets: tickets that there are at first; `extend` adds some.
        is_dealt: every num_workers-th ticket is this rank's, whoever is faster; otherwise each rank takes the next one
            when it has room, see `fair_share`.
        store: the store to use; None takes torch.distributed's.
    """

    def __init__(
        self, worker: int | None, num_workers: int, num_tickets: int, *, is_dealt: bool, store: Store | None = None
    ) -> None:
        self._prefix = f"megatron_fipo/ordered_work/{next(_numbers)}"
        self._worker, self._num_workers, self._num_tickets = worker, num_workers, num_tickets
        self._num_told = 0
        """Words that rank 0 has heard, one about each ticket that is done."""
        self._num_done = 0
        """How many it had heard when there came to be so many tickets."""
        self._store: Store | None = None
        if worker is not None and num_workers > 1:
            self._store = _get_default_store() if store is None else store
        self._dealt = itertools.count(worker or 0, num_workers) if is_dealt or self._store is None else None
        self._next: int | None = None
        """A ticket that this rank has taken and may not use yet."""
        self._own_words: deque[bytes] = deque()
        self._is_over = False
        self._num_meetings = 0
        """Meetings to which this rank has come."""

    def take(self) -> int | None:
        """The next ticket; None if there is none now, or no more work is wanted."""
        if self._is_over:
            return None
        if self._next is None:
            if self._dealt is not None:
                self._next = next(self._dealt)
            else:
                assert self._store is not None, "with one worker all tickets are dealt to it"
                self._next = self._store.add(self._key("taken"), 1) - 1
        if self._next >= self._num_tickets:
            return None  # it is kept until there are more
        ticket, self._next = self._next, None
        return ticket

    @property
    def fair_share(self) -> int | None:
        """Tickets that this rank may be at work on and still take another one; None where that does not matter.

        Who has room for all of them and comes first would leave the others nothing to do.
        """
        if self._dealt is not None or self._next is not None:
            return None  # nobody else can take it
        return -(-(self._num_tickets - self._num_done) // self._num_workers)

    def extend(self, num_tickets: int) -> None:
        """There are so many tickets now, not fewer than before; rank 0 says so to all."""
        if num_tickets > self._num_tickets:
            self._num_tickets, self._num_done = num_tickets, self._num_told
            if self._store is not None:
                self._store.set(self._key("tickets"), f"{num_tickets} {self._num_done}")

    def tell(self, word: bytes, *, about_ticket: bool = True) -> None:
        """Tell rank 0 something.

        Args:
            about_ticket: whether a ticket is done with it.
        """
        word = (_ABOUT_TICKET if about_ticket else _ABOUT_OTHERS) + word
        if self._worker == 0 or self._store is None:
            self._own_words.append(word)
        else:
            self._store.queue_push(self._key("words"), word)

    def told(self) -> list[bytes]:
        """What was told since this was last called, on rank 0."""
        words = list(self._own_words)
        self._own_words.clear()
        if self._store is not None:
            key = self._key("words")
            words += [self._store.queue_pop(key) for _ in range(self._store.queue_len(key))]
        self._num_told += sum(word.startswith(_ABOUT_TICKET) for word in words)
        return [word[1:] for word in words]

    def come(self) -> None:
        """Come to the next meeting: all that this rank has told so far is heard there."""
        self._num_meetings += 1
        if self._store is not None:
            self._store.add(self._meeting("come"), 1)

    def is_met(self, decide: Callable[[], None]) -> bool:
        """Whether the meeting to which this rank has come is over. Asked again until it is, or all work is over.

        Args:
            decide: called on rank 0 when every worker has come, so that what it says (`extend`, `end`) depends on
                nothing but what was told before the meeting. All workers hear of it before they go on.
        """
        if self._worker != 0:
            assert self._store is not None, "the only worker is worker 0"
            is_met = self._store.check([self._meeting("over")])
            if is_met:
                self._read_tickets(self._store)
            return is_met
        if self._store is not None and self._store.add(self._meeting("come"), 0) < self._num_workers:
            return False
        decide()
        if self._store is not None:
            self._store.set(self._meeting("over"), "")
        return True

    def end(self) -> None:
        """Tell all ranks that no more work is wanted."""
        self._is_over = True
        if self._store is not None:
            self._store.set(self._key("over"), "")

    def leave(self) -> None:
        """Take no more tickets, whatever the others do."""
        self._is_over = True

    def look(self) -> bool:
        """Look whether there are more tickets, and whether a rank has ended the work."""
        if not self._is_over and self._store is not None:
            self._is_over = self._store.check([self._key("over")])
            may_want_more = self._next is not None or self._dealt is None
            if may_want_more and self._worker != 0:
                self._read_tickets(self._store)
        return self._is_over

    def _read_tickets(self, store: Store) -> None:
        if store.check([self._key("tickets")]):
            self._num_tickets, self._num_done = map(int, store.get(self._key("tickets")).split())

    @property
    def is_over(self) -> bool:
        """Whether this rank knows that no more work is wanted."""
        return self._is_over

    def _key(self, what: str) -> str:
        return f"{self._prefix}/{what}"

    def _meeting(self, what: str) -> str:
        return self._key(f"meeting/{self._num_meetings}/{what}")
