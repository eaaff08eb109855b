"""Sends requests to servers until each is answered: none is lost, and only one answer to each is used."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_fipo.metrics.reductions import Max, Mean, Metrics, Sum
from megatron_fipo.rollout.engine import GenerationRequest
from megatron_fipo.rollout.servers.api import Completion
from megatron_fipo.rollout.servers.http import ServerConnection, ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.server import Server

_ABORT_AGAIN_S = 0.5
"""Pause before each attempt to end requests that were still on their way when servers ended all that they knew."""
_TAIL_SHARE = 0.9
"""The tail is the time after this share of a step's responses has arrived."""
_MAX_SENDS = 5
"""Give up on a request after this many sends: it may be what kills the servers."""


@dataclass
class _Load:
    """What generation did since the metrics were last read."""

    num_resent: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    durations: list[float] = field(default_factory=list)
    """Seconds that each response took, waiting for its turn included."""
    ends: list[float] = field(default_factory=list)
    """Time at which each response arrived."""


@dataclass(frozen=True)
class _Sent:
    """One request on its way.

    Attributes:
        request_id: unique among all that servers ever get.
        holders: the servers that may be working on it: the chosen one, or behind a router any.
    """

    request_id: str
    holders: Sequence[Server]


class Slots:
    """Lets so many requests be in flight, in the order in which they come; how many may change.

    It belongs to one event loop.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._num_in_use = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        """Turns of those that wait. Empty unless all slots are in use, but for turns that were cancelled."""

    async def __aenter__(self) -> None:
        if self._num_in_use < self.number:
            self._num_in_use += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # its turn had come
                await self.__aexit__()
            raise

    async def __aexit__(self, *exception: object) -> None:
        self._num_in_use -= 1
        self._fill()

    def change(self, number: int) -> None:
        """Let so many be in use from now on. Those that are go on."""
        self.number = number
        self._fill()

    def _fill(self) -> None:
        while self._waiting and self._num_in_use < self.number:
            turn = self._waiting.popleft()
            if not turn.done():
                self._num_in_use += 1
                turn.set_result(None)


class Sender:
    """Shares requests out over the servers of a pool. It belongs to the pool's event loop.

    Args:
        pool: the servers.
        max_concurrent_requests: most requests in flight at a time, over all servers; `slots` holds it.
        timeout_s: longest wait for one response.
    """

    def __init__(self, pool: ServerPool, max_concurrent_requests: int, timeout_s: float) -> None:
        self._pool, self._timeout_s = pool, timeout_s
        self.slots = Slots(max_concurrent_requests)
        self._load = _Load()
        self._numbers = itertools.count()
        self._abort_below = 0
        """Requests with a lower number have been aborted."""
        self._in_flight: dict[int, _Sent] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def complete(self, request: GenerationRequest, stop_token_ids: Sequence[int]) -> Completion:
        """One response, after those that were asked for earlier have been given a place.

        Raises:
            ServerError: if a server refuses the request, in its own words, or none is left to send it to.
        """
        now = asyncio.get_running_loop().time
        number, start = next(self._numbers), now()
        async with self.slots:
            completion = await self._send_until_answered(request, number, stop_token_ids)
        self._load.num_cached_tokens += completion.num_cached_tokens
        self._load.num_prompt_tokens += len(request.prompt_ids) + len(request.prefix)
        self._load.ends.append(now())
        self._load.durations.append(self._load.ends[-1] - start)
        return completion

    def abort(self) -> None:
        """End every request that was asked for until now; each returns what it has, with finish_reason "abort"."""
        self._abort_below = next(self._numbers)
        self._spawn(self._pool.roster.wake())  # those that wait for a server
        for server in self._pool.servers:
            self._spawn(self._tell(server, server.client.abort_all()))
        self._spawn(self._abort_late_ones())

    def take_metrics(self) -> Metrics:
        """What generation took since this was last called."""
        load, self._load = self._load, _Load()
        metrics: Metrics = {
            "rollout/requests_resent": Sum(load.num_resent),
            "rollout/server_restarts": Sum(self._pool.num_restarts),
            "rollout/cached_prompt_share": Mean(load.num_cached_tokens, load.num_prompt_tokens),
        }
        if load.ends:
            ends = sorted(load.ends)
            metrics["time_s/rollout_slowest_sample"] = Max(max(load.durations))
            metrics["time_s/rollout_tail"] = Max(ends[-1] - ends[int(_TAIL_SHARE * (len(ends) - 1))])
        return metrics

    def forget_load(self) -> None:
        """Begin anew with what `take_metrics` tells, but for requests that were sent again, which are faults."""
        self._load = _Load(num_resent=self._load.num_resent)

    async def _send_until_answered(
        self, request: GenerationRequest, number: int, stop_token_ids: Sequence[int]
    ) -> Completion:
        reasons: list[str] = []
        while len(reasons) < _MAX_SENDS:
            if number < self._abort_below:
                return Completion((), (), "abort", ())
            # From here until the server is asked nothing may be awaited: meanwhile it could be held, or become stale.
            server = self._pool.choose(request.group_id)
            if server is None:
                await self._pool.wait_until_one_may_generate(unless=lambda: number < self._abort_below)
                continue
            router = None if reasons else self._pool.usable_router  # what was lost may have been lost by the router
            sent = _Sent(
                f"{request.sample_id}#{number}.{len(reasons)}", [server] if router is None else self._pool.servers
            )
            try:
                completion = await self._ask(server, router, request, number, sent, stop_token_ids)
            except ServerUnreachableError as error:
                reasons.append(str(error))
                for holder in sent.holders:
                    self._pool.suspect(holder, error)
            else:
                if completion.finish_reason != "abort" or number < self._abort_below:
                    return completion
                # Nobody asked for it: the server shuts down, or drops what it has no memory for.
                reasons.append(f"{server.name} ended the response by itself")
                self._pool.suspect(server, ServerError(reasons[-1]))
            self._load.num_resent += 1
        raise ServerError(
            f"sample {request.sample_id!r} was sent {_MAX_SENDS} times and never answered:\n" + "\n".join(reasons)
        )

    async def _ask(
        self,
        server: Server,
        router: ServerConnection | None,
        request: GenerationRequest,
        number: int,
        sent: _Sent,
        stop_token_ids: Sequence[int],
    ) -> Completion:
        """Send a request once. Servers that may work on it are told to stop if nobody waits for it any more."""
        answering = server.client.generate(request, sent.request_id, stop_token_ids, self._timeout_s, router)
        self._in_flight[number] = sent
        try:
            return await server.ask(answering)
        except (ServerUnreachableError, asyncio.CancelledError):
            self._cancel(sent)
            raise
        finally:
            del self._in_flight[number]

    def _cancel(self, sent: _Sent) -> None:
        for holder in sent.holders:
            self._spawn(self._tell(holder, holder.client.cancel(sent.request_id)))

    async def _abort_late_ones(self) -> None:
        """End requests that were on their way when servers ended all that they knew."""
        while late := [sent for number, sent in self._in_flight.items() if number < self._abort_below]:
            await asyncio.sleep(_ABORT_AGAIN_S)
            for sent in late:
                self._cancel(sent)

    async def _tell(self, server: Server, telling: Awaitable[None]) -> None:
        try:
            await telling
        except ServerError as error:
            self._pool.suspect(server, error)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
