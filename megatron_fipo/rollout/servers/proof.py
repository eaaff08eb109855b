"""Proof that weights arrived. What is not proven ends the run, before a response is generated with other weights.

Checksums of every tensor are compared bit for bit with those of the weights that were sent. They show what log-probs
miss: in bfloat16 a single corrupt value hardly moves any. Log-probs of fixed sequences, the canary, are compared with
the actor's. They show what checksums miss: a server that computes something else with the right weights. What neither
shows, keys and values of older weights in a cache, is the matter of `cache_proof`.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from megatron_fipo.metrics.reductions import Max, Metrics
from megatron_fipo.rollout.servers.http import ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.server import Server, State

T = TypeVar("T")

_SHOWN = 5
"""An error names this many tensors of each kind."""
_MAX_UNANSWERED = 5
"""Give up after this many unanswered requests for log-probs: they may be what kills the servers."""

DEFAULT_TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "fp8": 1e-1}
"""Largest mean |log-prob difference| between server and actor, by the arithmetic of both."""


class CanaryError(RuntimeError):
    """A server does not hold, or does not compute with, the actor's weights."""


def compare_checksums(server: str, expected: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Refuse any difference.

    Args:
        server: its name, for the message.
        expected: checksums of the weights that were sent.
        found: checksums of those that the server holds.

    Raises:
        CanaryError: naming tensors that differ, that the server lacks, and that were never sent to it.
    """
    problems = []
    for what, names in (
        ("differ", [name for name in expected if name in found and found[name] != expected[name]]),
        ("are missing", [name for name in expected if name not in found]),
        ("were not sent to it", [name for name in found if name not in expected]),
    ):
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            problems.append(f"{len(names)} tensors {what}: {', '.join(names[:_SHOWN])}{more}")
    if problems:
        raise CanaryError(f"{server} does not hold the weights that were sent to it: {'; '.join(problems)}")


@dataclass(frozen=True)
class LogProbDifference:
    """The difference between a server's log-probs and the actor's."""

    mean: float
    """Mean |difference| over all tokens."""
    max: float
    """Largest |difference| of a token."""

    def metrics(self) -> Metrics:
        """The difference as metrics, to be merged over ranks."""
        return {
            "canary/log_prob_difference/mean": Max(self.mean),
            "canary/log_prob_difference/max": Max(self.max),
        }


def canary_sequences(vocab_size: int, num_sequences: int, num_tokens: int = 64) -> list[list[int]]:
    """Fixed sequences of token ids, the same everywhere and always.

    Args:
        vocab_size: ids lie below it.
        num_sequences: how many.
        num_tokens: length of each.
    """
    numbers = random.Random(0)
    return [[numbers.randrange(vocab_size) for _ in range(num_tokens)] for _ in range(num_sequences)]


def compare_log_probs(
    server: str, actor: Sequence[Sequence[float]], found: Sequence[Sequence[float]], tolerance: float
) -> LogProbDifference:
    """Refuse a mean absolute difference above the tolerance.

    Args:
        server: its name, for the message.
        actor: log-probs of each sequence's tokens from the second on, at temperature 1.
        found: the server's log-probs of the same tokens.
        tolerance: largest mean absolute difference.

    Raises:
        CanaryError: with the difference; also where a number is not finite.
        ValueError: if the two do not have the same lengths.
    """
    difference = log_prob_difference(actor, found)
    if not difference.mean <= tolerance:  # NaN compares false
        raise CanaryError(
            f"{server} gives other log-probs than the actor: mean |difference| {difference.mean:.3g} over "
            f"{sum(map(len, actor))} tokens, largest {difference.max:.3g}; servers.canary_tolerance allows "
            f"{tolerance:g}"
        )
    return difference


def log_prob_difference(actor: Sequence[Sequence[float]], found: Sequence[Sequence[float]]) -> LogProbDifference:
    """The absolute difference of log-probs of the same tokens.

    Raises:
        ValueError: if the two do not have the same lengths.
    """
    differences = [
        abs(ours - theirs)
        for our_sequence, their_sequence in zip(actor, found, strict=True)
        for ours, theirs in zip(our_sequence, their_sequence, strict=True)
    ]
    return LogProbDifference(sum(differences) / len(differences), max(differences))


async def prove_log_probs(
    pool: ServerPool,
    sequences: Sequence[Sequence[int]],
    actor: Sequence[Sequence[float]],
    tolerance: float,
    timeout_s: float,
) -> LogProbDifference:
    """Compare the log-probs of every server that may generate with the actor's. To be awaited on the pool's event loop.

    Servers that die meanwhile, or fail, are treated as `of_every_server` does it.

    Returns:
        The largest difference.

    Raises:
        CanaryError: naming the server whose log-probs differ by more than the tolerance.
        ServerError: if a server refuses, or none is left that could be compared.
    """

    async def prove(server: Server) -> LogProbDifference:
        found = await server.ask(server.client.score(sequences, timeout_s))
        return compare_log_probs(server.name, actor, found, tolerance)

    return max(await of_every_server(pool, prove), key=lambda difference: difference.mean)


async def of_every_server(pool: ServerPool, prove: Callable[[Server], Awaitable[T]]) -> list[T]:
    """Have every server that may generate, or is about to, prove something, and return what the proofs gave.

    A server that dies meanwhile is looked after like any other that does not answer, and others are asked; at least
    one is. A server that fails becomes STALE; one that has just joined is LOST, and no reason to stop.

    Raises:
        CanaryError: what a proof raised.
        ServerError: if a server refuses, or none is left that could be asked.
    """
    proofs: list[T] = []
    reasons: list[str] = []
    while not proofs:
        if len(reasons) >= _MAX_UNANSWERED:
            raise ServerError("no server answered for its log-probs:\n" + "\n".join(reasons))
        await pool.wait_until_one_may_generate(unless=lambda: bool(pool.roster.in_state(State.JOINING)))
        for server in pool.roster.in_state(State.READY, State.JOINING):
            try:
                proofs.append(await prove(server))
            except (ServerError, CanaryError) as error:
                if not server.is_proven or isinstance(error, ServerUnreachableError):
                    reasons.append(str(error))
                    pool.suspect(server, error)
                    continue
                if isinstance(error, ServerError):
                    raise
                await pool.set_stale(server, str(error))
                raise
    return proofs
