"""A step that is being generated: what its stream is to do, and rank 0's books of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.rl.judged_group import from_bytes
from megatron_fipo.rl.prompt_order import FreshSamples, PromptOrderBooks
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory
from megatron_fipo.rollout.generation import StreamOrder
from megatron_fipo.rollout.held import Held


@dataclass
class OpenStep:
    """A step that is being generated. Its stream may run in another thread.

    Attributes:
        order: what the stream is to generate.
        held: what this rank has of judged responses.
        books: on rank 0.
        num_judged: responses that this rank has had judged.
        show: called after each of them; not where the stream runs in another thread.
        num_steps_ahead: steps by which prompts may be begun from now on; None: as when the step was opened.
        is_wanted: whether the stream is to end when the batch is full; until then it goes on with what is ahead.
    """

    order: StreamOrder
    held: Held
    fresh: FreshSamples
    books: PromptOrderBooks | None
    num_judged: int = 0
    show: Callable[[], None] = lambda: None
    num_steps_ahead: int | None = None
    is_wanted: threading.Event = field(default_factory=threading.Event)

    @property
    def work(self) -> OrderedWork:
        """Who takes which response."""
        return self.order.work

    def look(self) -> None:
        """Enter what ranks have told, and say what may be begun, and whether the step is over; on rank 0."""
        books, work = self.books, self.work
        if books is None:
            return
        for part in from_bytes(work.told()):
            books.add(part)
        if self.num_steps_ahead is not None:
            books.look_ahead(self.num_steps_ahead)
        work.extend(self.fresh.num_until(books.num_to_begin))
        if self.is_wanted.is_set() and books.is_over and not work.is_over:
            work.end()


def hold(held: Held, step: int, prompt: Prompt, sample: Trajectory) -> Group:
    """Keep a judged response. What was needed to judge it alone is dropped."""
    sample.response_text = ""
    group = Group(replace(prompt, row=None), [sample], step)
    held.add(group)
    return group
