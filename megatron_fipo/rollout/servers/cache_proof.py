"""Proof that servers reuse no keys and values of older weights.

The log-probs that `proof` compares are computed anew at all positions, so they say nothing about a prefix cache that an
update has left as it was. Therefore one more fixed sequence goes the way of ordinary requests. Before an update its
keys and values are brought into every server's cache. After it, the server must find none of them there, by its own
count, and the log-probs that it computes on what it found must be the actor's. The count is exact. The log-probs do not
rely on it, but show only what differs by more than rounding.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from megatron_fipo.metrics.reductions import Max, Metrics, Min
from megatron_fipo.rollout.servers.api import ScoredEnd
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.proof import CanaryError, log_prob_difference, of_every_server
from megatron_fipo.rollout.servers.server import Server, State

CACHE_CANARY_TOKENS = 512
"""Several blocks of any server's cache, which reuses whole blocks only: most have 1 to 128 tokens."""
_MOST_END_TOKENS = 8
"""So many log-probs are compared; vLLM takes a request for each."""
_MOST_SHARED = 4
"""Finding more than one token in so many is reuse. Other prompts of the new weights may begin like the sequence."""
_REMEDY = (
    "A cache that servers.extra_args add, on the host or shared between servers, may outlive an update: leave it out, "
    "or turn the prefix cache off (SGLang: --disable-radix-cache, vLLM: --no-enable-prefix-caching)."
)


def cache_canary(vocab_size: int, num_tokens: int) -> list[int]:
    """A fixed sequence of token ids, the same everywhere and always; none of `proof.canary_sequences`."""
    numbers = random.Random(1)
    return [numbers.randrange(vocab_size) for _ in range(num_tokens)]


class CacheProof:
    """Has the servers of a pool show, after each update, that they reuse nothing of older weights.

    Its coroutines are to be awaited on the pool's event loop.

    Args:
        tolerance: largest mean absolute difference of log-probs to the actor's.
        timeout_s: longest wait for a server's answer.
    """

    def __init__(self, pool: ServerPool, tolerance: float, timeout_s: float) -> None:
        self._pool, self._tolerance, self._timeout_s = pool, tolerance, timeout_s
        self._held: int | None = None
        self._metrics: Metrics = {}

    async def warm(self, sequence: Sequence[int]) -> None:
        """Bring a sequence's keys and values into the cache of every server that may generate.

        A server that does not do it is looked after like any other that does not answer.
        """
        ready = self._pool.roster.in_state(State.READY)
        self._held = min(await asyncio.gather(*(self._warm(server, sequence) for server in ready)), default=0)

    async def prove(self, sequence: Sequence[int], actor: Sequence[float]) -> None:
        """Ask every server that may generate about a sequence that it should have forgotten.

        It is the sequence's first use since the update. Servers that die or fail are treated as in `of_every_server`.

        Args:
            sequence: what `warm` brought in.
            actor: the actor's log-probs of its tokens from the second on, at temperature 1.

        Raises:
            CanaryError: naming the server that reused something.
            ServerError: if a server refuses, or none is left to be asked.
        """

        async def prove(server: Server) -> int:
            return await self._prove(server, sequence, actor)

        found = max(await of_every_server(self._pool, prove))
        self._metrics = {"canary/cached_tokens/after": Max(found)}
        if self._held is not None:
            self._metrics["canary/cached_tokens/before"] = Min(self._held)
        self._held = None

    def metrics(self) -> Metrics:
        """What was found in the caches around the last update, to be merged over ranks."""
        return self._metrics

    async def _warm(self, server: Server, sequence: Sequence[int]) -> int:
        """How many tokens of the sequence its cache holds now; 0 if it did not say."""
        try:
            await self._end(server, sequence, 1)
            return (await self._end(server, sequence, 1)).num_cached_tokens
        except ServerError as error:
            self._pool.suspect(server, error)
            return 0

    async def _prove(self, server: Server, sequence: Sequence[int], actor: Sequence[float]) -> int:
        num_end_tokens = max(1, min(_MOST_END_TOKENS, len(sequence) // 4))
        num_prompt_tokens = len(sequence) - num_end_tokens
        end = await self._end(server, sequence, num_end_tokens)
        if end.num_cached_tokens * _MOST_SHARED > num_prompt_tokens:
            raise CanaryError(
                f"{server.name} reuses keys and values of older weights: directly after an update, "
                f"{end.num_cached_tokens} of a canary prompt's {num_prompt_tokens} tokens came from its prefix cache, "
                f"which the update must empty. {_REMEDY}"
            )
        difference = log_prob_difference([actor[-num_end_tokens:]], [end.log_probs])
        if not difference.mean <= self._tolerance:  # NaN compares false
            raise CanaryError(
                f"{server.name} gives other log-probs than the actor where it may use its prefix cache, and the "
                f"actor's where it may not: mean |difference| {difference.mean:.3g} over {num_end_tokens} tokens, "
                f"largest {difference.max:.3g}; servers.canary_tolerance allows {self._tolerance:g}. It seems to reuse "
                f"keys and values of older weights. {_REMEDY}"
            )
        return end.num_cached_tokens

    async def _end(self, server: Server, sequence: Sequence[int], num_tokens: int) -> ScoredEnd:
        return await server.ask(server.client.score_end(sequence, num_tokens, self._timeout_s))
