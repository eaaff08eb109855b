"""Servers on GPUs of their own generate without a pause while the trainer trains."""

from __future__ import annotations

import math

from megatron_fipo.preflight.schedules.books import Books
from megatron_fipo.preflight.schedules.cluster import Cluster
from megatron_fipo.preflight.schedules.outcome import Recorder, Setup, Step, trained_lengths


def simulate_dedicated(setup: Setup, books: Books, *, steps: int, keeps_cache: bool) -> list[Step]:
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
            taken = books.close(cluster.drop)
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
