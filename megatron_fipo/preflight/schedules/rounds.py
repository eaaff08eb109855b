"""Today's schedule: rounds of prompts, each of which is waited for to the last response."""

from __future__ import annotations

from collections import deque

from megatron_fipo.preflight.schedules.books import Books
from megatron_fipo.preflight.schedules.cluster import Cluster
from megatron_fipo.preflight.schedules.outcome import Recorder, Setup, Step, trained_lengths
from megatron_fipo.preflight.schedules.server import Group, Response, Server
from megatron_fipo.preflight.schedules.workload import Workload


class RoundBooks(Books):
    """Books of rounds, which start prompts by the round. The bound is that of whole groups beyond the batch.

    A group is kept for a later step as long as it was started fewer versions than the bound before.
    """

    def _leave_behind(self, last: int) -> None:
        old = [group for group in self._judged.values() if self.version - group.version >= self.bound]
        self.tokens.wasted += sum(group.tokens for group in old)
        for group in old:
            del self._judged[group.prompt]
        self._ready = [prompt for prompt in self._ready if prompt in self._judged]


def simulate_rounds(
    setup: Setup, workload: Workload, *, per_round: int | None, spread: bool, surplus_age: int = 0, steps: int = 2
) -> list[Step]:
    """Colocated steps in rounds.

    Args:
        per_round: prompts of a round; None takes the batch first, then twice what is missing.
        spread: whether any server takes any response. Otherwise node i mod n gets prompt i, sends as many requests at a
            time as its servers have slots, and a group goes whole to the server that has the least then.
        surplus_age: steps for which groups beyond the batch are kept.
    """
    cluster = Cluster(setup.decoding, setup.num_servers, workload.lengths, setup.claims)
    books = RoundBooks(workload, setup.batch, surplus_age)
    recorder = Recorder(books)
    now = 0.0
    for step in range(steps):
        cluster.start_at(now, step)
        rounds = 0
        while books.num_ready < setup.batch:
            number = per_round or (setup.batch if rounds == 0 else 2 * (setup.batch - books.num_ready))
            groups = [books.start() for _ in range(number)]
            (_run_spread if spread else _run_shares)(setup, cluster, books, groups)
            cluster.start_at(cluster.now, step)
            rounds += 1
        generation = cluster.now - now
        taken = books.close()
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


def _run_spread(setup: Setup, cluster: Cluster, books: Books, groups: list[Group]) -> None:
    """One queue of responses over all servers."""
    queue = deque(response for group in groups for response in group.responses)

    def peek() -> Response | None:
        return queue[0] if queue else None

    cluster.hand_out(peek, queue.popleft)
    while cluster.is_running:
        server, done = cluster.next()
        for response in done:
            books.finish(response)
        cluster.fill(server, peek, queue.popleft)


def _run_shares(setup: Setup, cluster: Cluster, books: Books, groups: list[Group]) -> None:
    """A queue at each node, and groups that stay together."""
    size = min(setup.servers_per_node, setup.num_servers)
    nodes = [cluster.servers[first : first + size] for first in range(0, setup.num_servers, size)]
    queues: list[deque[Group]] = [deque(groups[number :: len(nodes)]) for number in range(len(nodes))]
    rest: list[deque[Response]] = [deque() for _ in nodes]
    places: dict[int, Server] = {}

    def pump(number: int) -> None:
        servers, queue, open_ = nodes[number], queues[number], rest[number]
        free = setup.decoding.slots * len(servers) - sum(server.load for server in servers)
        more: dict[int, list[Response]] = {}
        while free > 0 and (queue or open_):
            if not open_:
                group = queue.popleft()
                open_.extend(group.responses)
                places[group.prompt] = min(servers, key=lambda server: server.load + len(more.get(server.number, ())))
            response = open_.popleft()
            more.setdefault(places[response.group.prompt].number, []).append(response)
            free -= 1
        for place, responses in more.items():
            cluster.send(cluster.servers[place], responses)

    for number in range(len(nodes)):
        pump(number)
    while cluster.is_running:
        server, done = cluster.next()
        for response in done:
            books.finish(response)
        if done:
            pump(server.number // size)
