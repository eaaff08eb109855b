"""Servers on GPUs of their own generate without a pause while the trainer trains."""

from __future__ import annotations

import math

from megatron_fipo.preflight.schedules.books import Books
from megatron_fipo.preflight.schedules.cluster import Cluster
from megatron_fipo.preflight.schedules.outcome import Recorder, Setup, Step, trained_lengths
from megatron_fipo.preflight.schedules.workload import Workload


class DedicatedBooks(Books):
    """Books of servers that never stop: the bound is on the start of prompts, and nothing is waited for or thrown away.

    A step trains on the groups that are ready, in prompt order. By AReaL's rule (arXiv 2505.24298), counted in prompts,
    at most (bound + 1) batches may be in flight, ready or in the trainer.
    """

    def __init__(self, workload: Workload, batch: int, bound: int) -> None:
        self._in_training = 0
        super().__init__(workload, batch, bound)

    @property
    def may_start(self) -> bool:
        """Whether another prompt may be started: groups that are expected to be kept do not exceed what is wanted."""
        expected = self.workload.kept * len(self._unfinished)
        return self._in_training + len(self._ready) + expected < (self.bound + 1) * self.batch

    @property
    def is_full(self) -> bool:
        """Whether the step can be closed."""
        return len(self._ready) >= self.batch

    def _leave_behind(self, last: int) -> None:
        self._in_training = self.batch

    def next_version(self) -> None:
        """See `Books`."""
        super().next_version()
        self._in_training = 0


def simulate_dedicated(setup: Setup, books: DedicatedBooks, *, steps: int, keeps_cache: bool) -> list[Step]:
    """The trainer takes a batch when the books can close it; its weights go to the servers with requests in flight.

    Args:
        keeps_cache: whether keys and values of older weights stay in use. Otherwise they are computed anew.
    """
    cluster = Cluster(setup.decoding, setup.num_servers, books.workload.lengths, setup.claims)
    recorder = Recorder(books)
    trainer_ends, trainer_is_free, before = math.inf, 0.0, 0.0
    cluster.hand_out(books.peek, books.take)
    while len(recorder.steps) < steps:
        if trainer_ends <= cluster.next_time():
            cluster.now, trainer_ends = trainer_ends, math.inf
            books.next_version()
            trainer_is_free = cluster.now + setup.handover
            cluster.take_weights(books.version, setup.handover, keeps_cache)
            cluster.hand_out(books.peek, books.take)
        else:
            server, done = cluster.next()
            judged = [books.finish(response) for response in done]
            cluster.fill(server, books.peek, books.take)
            if any(judged):
                cluster.hand_out(books.peek, books.take)
        if trainer_ends == math.inf and books.is_full:
            begins = max(cluster.now, trainer_is_free)
            taken = books.close()
            training = setup.training_seconds(trained_lengths(taken))
            trainer_ends = begins + training
            end = trainer_ends + setup.handover
            recorder.add(
                taken,
                seconds=end - before,
                generation=end - before,
                training=training,
                busy=cluster.busy,
                generated=cluster.tokens,
            )
            before = end
            cluster.hand_out(books.peek, books.take)
    return recorder.steps
