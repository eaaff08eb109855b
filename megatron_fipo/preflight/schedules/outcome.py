"""What a schedule comes to: step by step while it runs, and on average."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.preflight.schedules.books import Books, Tokens
from megatron_fipo.preflight.schedules.decoding import Decoding
from megatron_fipo.preflight.schedules.server import Group


@dataclass(frozen=True)
class Setup:
    """The GPUs of one schedule, and what its steps cost.

    Attributes:
        decoding: one server.
        num_servers: number of servers.
        server_gpus: GPUs of one server.
        gpus: GPUs of the run: those that generate, that train, or both in turn.
        training_gpus: of them, those that train.
        batch: groups that a step trains on.
        training_seconds: time to train on responses of these lengths, on training_gpus.
        handover: seconds in which weights go over and nothing else happens on the servers.
        claims: responses that a server claims at a time where any server may take any response. More than fit are only
            put out of a full cache again, and then finish last.
        servers_per_node: servers that one node's leader sends to.
    """

    decoding: Decoding
    num_servers: int
    server_gpus: int
    gpus: int
    training_gpus: int
    batch: int
    training_seconds: Callable[[Sequence[int]], float]
    handover: float
    claims: int
    servers_per_node: int = 1


@dataclass(frozen=True)
class Step:
    """One step that was simulated.

    Attributes:
        seconds: from the end of the step before to its own end.
        generation: seconds in which responses were generated. training: seconds of old log-probs and updates.
        busy: seconds in which servers had something to do, all added up.
        generated: tokens that were generated meanwhile.
        tokens: what was decided about tokens at its end.
        staleness: (tokens, how many versions older than the step's weights the weights were that wrote them).
        responses: number of responses that were trained on.
    """

    seconds: float
    generation: float
    training: float
    busy: float
    generated: int
    tokens: Tokens
    staleness: dict[int, int]
    responses: int


@dataclass(frozen=True)
class Outcome:
    """A schedule's average step.

    Attributes:
        seconds: of a step. generation, training: of its phases, which overlap on dedicated servers.
        without_work: share of the GPUs' time in which they have nothing to do.
        dropped: share of the generated tokens in groups without a signal. wasted: share that was generated in vain.
        staleness: mean number of versions between the weights that wrote a token and those that it trains first.
        stalest: the largest such number.
        response: mean length of what was trained on.
    """

    name: str
    seconds: float
    generation: float
    training: float
    without_work: float
    dropped: float
    wasted: float
    staleness: float
    stalest: int
    response: float


class Recorder:
    """Notes steps as they end, from cumulative counts."""

    def __init__(self, books: Books) -> None:
        self.steps: list[Step] = []
        self._books = books
        self._busy = 0.0
        self._generated = 0
        self._tokens = Tokens()

    def add(
        self, taken: Sequence[Group], *, seconds: float, generation: float, training: float, busy: float, generated: int
    ) -> None:
        """Note a step that trains on these groups; call it between `Books.close` and `Books.next_version`.

        Args:
            busy, generated: of all servers since the beginning.
        """
        version, now, before = self._books.version, self._books.tokens, self._tokens
        self._tokens = Tokens(now.trained, now.dropped, now.wasted)
        staleness: dict[int, int] = {}
        for group in taken:
            for response in group.responses:
                for written_by, count in response.spans:
                    staleness[version - written_by] = staleness.get(version - written_by, 0) + count
        step = Step(
            seconds=seconds,
            generation=generation,
            training=training,
            busy=busy - self._busy,
            generated=generated - self._generated,
            tokens=Tokens(now.trained - before.trained, now.dropped - before.dropped, now.wasted - before.wasted),
            staleness=staleness,
            responses=sum(len(group.responses) for group in taken),
        )
        self.steps.append(step)
        self._busy, self._generated = busy, generated


def summary(name: str, setup: Setup, steps: Sequence[Step]) -> Outcome:
    """Average of these steps."""
    count = len(steps)
    seconds = sum(step.seconds for step in steps)
    generated = sum(step.tokens.trained + step.tokens.dropped + step.tokens.wasted for step in steps)
    trained = sum(step.tokens.trained for step in steps)
    training = sum(step.training for step in steps)
    work = sum(step.busy for step in steps) * setup.server_gpus + training * setup.training_gpus
    versions = [(age, tokens) for step in steps for age, tokens in step.staleness.items()]
    return Outcome(
        name=name,
        seconds=seconds / count,
        generation=sum(step.generation for step in steps) / count,
        training=training / count,
        without_work=1 - work / (setup.gpus * seconds),
        dropped=sum(step.tokens.dropped for step in steps) / generated,
        wasted=sum(step.tokens.wasted for step in steps) / generated,
        staleness=sum(age * tokens for age, tokens in versions) / trained,
        stalest=max(age for age, _ in versions),
        response=trained / sum(step.responses for step in steps),
    )


def trained_lengths(groups: Sequence[Group]) -> list[int]:
    """Tokens of each response of a step's groups."""
    return [response.made for group in groups for response in group.responses]
