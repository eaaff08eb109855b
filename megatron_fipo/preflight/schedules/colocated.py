"""Servers and trainer take turns on the same GPUs, and prompts are started one by one in order."""

from __future__ import annotations

from megatron_fipo.preflight.schedules.books import Books
from megatron_fipo.preflight.schedules.cluster import Cluster
from megatron_fipo.preflight.schedules.outcome import Recorder, Setup, Step, trained_lengths


def simulate_colocated(setup: Setup, books: Books, *, steps: int) -> list[Step]:
    """Streaming with a bound of 0 in the books, carry-over with a larger one.

    A step's generation ends as soon as the books can close it. What is in flight then is aborted; what the books keep
    goes on in the next step from where it was, after its keys and values have been computed anew.
    """
    cluster = Cluster(setup.decoding, setup.num_servers, books.workload.lengths, setup.claims)
    recorder = Recorder(books)
    now = 0.0
    for _ in range(steps):
        cluster.start_at(now, books.version)
        cluster.hand_out(books.peek, books.take)
        while not books.is_full:
            server, done = cluster.next()
            judged = [books.finish(response) for response in done]
            cluster.fill(server, books.peek, books.take)
            if any(judged):
                cluster.hand_out(books.peek, books.take)
        left = cluster.abort()
        generation = cluster.now - now
        taken = books.close()
        books.go_on_with(left)
        training = setup.training_seconds(trained_lengths(taken))
        seconds = generation + training + setup.handover
        recorder.add(
            taken,
            seconds=seconds,
            generation=generation,
            training=training,
            busy=cluster.busy,
            generated=cluster.tokens,
        )
        books.next_version()
        now += seconds
    return recorder.steps
