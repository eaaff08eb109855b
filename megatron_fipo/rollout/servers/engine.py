"""Rollout engine over inference servers: shares requests out, loses none, doubles none, and hands weights over."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from megatron_fipo.metrics.reductions import Max, Mean, Metrics, Min, Sum
from megatron_fipo.parallel.device_memory import give_back_caches
from megatron_fipo.rl.trajectory import policy_segments
from megatron_fipo.rollout.engine import ALL_PROMPTS, GenerationRequest, Policy, Share, Turn, check_request
from megatron_fipo.rollout.servers.api import Completion, InferenceServer
from megatron_fipo.rollout.servers.canary import CanaryError, LogProbDifference, canary_sequences, compare_log_probs
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.http import ServerError, ServerUnreachableError
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.pool import Server, ServerPool, State
from megatron_fipo.rollout.servers.weight_sync import SyncReport, WeightSync

T = TypeVar("T")

_ABORT_AGAIN_S = 0.5
_TAIL_SHARE = 0.9
"""The tail is what the step waits for once so much of its responses are there."""
_MAX_SENDS = 5
"""Of one request, before the run stops: what several servers in a row died of may be the request itself."""


@dataclass
class _Load:
    """What generation did since the metrics were last read."""

    num_resent: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    durations: list[float] = field(default_factory=list)
    """Seconds that each response took, waiting for its turn included."""
    ends: list[float] = field(default_factory=list)
    """When each was there."""


class ServerEngine:
    """A `RolloutEngine` over the servers that this process owns.

    Methods may be called from any thread, and `generate` from any event loop; all HTTP runs in a thread of the engine's
    own. On a rank that owns no servers `pool` is None: the engine then takes part in what is collective, and generates
    nothing.

    Args:
        pool: the servers, not started yet.
        loop: where the pool is to live.
        sync: brings weights in.
        packers: on a rank that owns no servers, what it packs along for those on its GPU; None where there are none.
        check_before_start: what must hold before servers are started, such as that both sides have the same NCCL;
            raises ServerError.
        agree: exchanges a problem ("" for none) with all ranks and returns everyone's, so that a failure on one stops
            all of them, with the same words. Collective.
        share: of the prompts, this rank's; None where it owns no servers.
        stop_token_ids: tokens that end a response.
        vocab_size: token ids lie below it. Servers die of others, hence the check.
        max_concurrent_requests: in flight at a time, over all servers.
        request_timeout_s: longest wait for one response.
        canary_tolerance: largest mean |log-prob difference| to the policy.
        num_canaries: sequences of canary_tokens tokens that `give` compares it on; 0: none.
        colocated: whether the servers' memory is to be released while the actor trains.
    """

    repeatable = False

    def __init__(
        self,
        pool: ServerPool | None,
        loop: EventLoopThread | None,
        sync: WeightSync | None,
        *,
        agree: Callable[[str], Sequence[str]],
        share: Share | None = ALL_PROMPTS,
        stop_token_ids: Collection[int],
        vocab_size: int,
        max_concurrent_requests: int,
        request_timeout_s: float,
        canary_tolerance: float,
        num_canaries: int = 0,
        canary_tokens: int = 0,
        colocated: bool = False,
        packers: Packers | None = None,
        check_before_start: Callable[[], None] = lambda: None,
    ) -> None:
        self.pool, self.sync, self._loop, self._agree = pool, sync, loop, agree
        self._packers, self._check_before_start = packers, check_before_start
        self.share, self.colocated = share, colocated
        self.policy_version = 0
        self.stop_token_ids = frozenset(stop_token_ids)
        self._vocab_size = vocab_size
        self._request_timeout_s, self._canary_tolerance = request_timeout_s, canary_tolerance
        self._num_canaries, self._canary_tokens = num_canaries, canary_tokens
        self._given: int | None = None
        self._slots = asyncio.Semaphore(max_concurrent_requests)
        self._load = _Load()
        self._numbers = itertools.count()
        self._abort_below = 0
        self._in_flight: dict[int, tuple[Server, str]] = {}
        self._waiting: set[asyncio.Future[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._memory: Literal["resident", "released", "weights only"] = "resident"
        self._last_sync: SyncReport | None = None
        self._last_canary: LogProbDifference | None = None
        self._is_closed = False

    def start(self, policy: Policy | None = None) -> None:
        """Start the servers, or attach to them. Collective.

        They take for their caches what memory is free when they start. So colocated ones start while the policy's is
        lent, as it is whenever they generate, and give theirs back before the policy takes its own again.

        Args:
            policy: that is trained on the servers' GPUs; None where they are their own.

        Raises:
            ServerError: on every rank, with the server's own words, if one does not come up.
        """
        if self.colocated and policy is not None:
            self._lend(policy)
        with self.collectively():
            if self.pool is not None:
                self._check_before_start()
                self._run(self.pool.start())
        if self.colocated and policy is not None:
            self.release_memory()
            policy.onload()

    def close(self) -> None:
        """End the servers that were started here. Not collective: also a rank that fails alone ends its own."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.pool is not None and self._loop is not None and self.sync is not None:
            self.sync.close()
            self._run(self.pool.close())
            self._loop.stop()

    def health(self) -> None:
        """Raise RuntimeError with the reasons if no server can generate."""
        if self._is_closed:
            raise RuntimeError("the rollout engine is closed")
        if self._memory != "resident":
            raise RuntimeError("the servers' memory is released; update_weights() and resume_memory() come first")
        if self.pool is not None and all(server.state in (State.STALE, State.LOST) for server in self.pool.servers):
            raise RuntimeError(f"no server can generate: {self.pool.reasons()}")

    # --- generating -------------------------------------------------------------------------------------------------

    async def generate(self, request: GenerationRequest) -> Turn:
        """Generate one response.

        A request whose answer was lost is sent again: sampling has no side effects, and one answer alone is used.

        Returns:
            The turn. With a prefix it holds what follows that, while `policy_versions` and max_tokens count from the
            start of the whole response.

        Raises:
            ValueError: if the request breaks a rule; the message names it.
            ServerError: if a server refuses the request, in its own words, or none is left to send it to.
        """
        self.health()
        if self.pool is None or self._loop is None:
            raise RuntimeError("this rank owns no servers; prompts are shared out over the ranks that do")
        check_request(request, self._vocab_size, self.stop_token_ids)
        completion = await self._loop.run_here(self._complete(self.pool, request))
        return _turn(request, completion)

    def abort(self) -> None:
        """End every request in flight; each returns what it has, finish_reason "abort". Safe in a signal handler."""
        if self.pool is not None and self._loop is not None:
            self._loop.call_soon(partial(self._begin_abort, self.pool))

    async def _complete(self, pool: ServerPool, request: GenerationRequest) -> Completion:
        now = asyncio.get_running_loop().time
        number, start = next(self._numbers), now()
        async with self._slots:
            completion = await self._send_until_answered(pool, request, number)
        self._load.num_cached_tokens += completion.num_cached_tokens
        self._load.num_prompt_tokens += len(request.prompt_ids) + len(request.prefix)
        self._load.ends.append(now())
        self._load.durations.append(self._load.ends[-1] - start)
        return completion

    async def _send_until_answered(self, pool: ServerPool, request: GenerationRequest, number: int) -> Completion:
        reasons: list[str] = []
        while len(reasons) < _MAX_SENDS:
            server = await self._choose(pool, request.group_id, number)
            if server is None:
                return Completion((), (), "abort", ())
            request_id = f"{request.sample_id}#{number}.{len(reasons)}"
            self._in_flight[number] = server, request_id
            router = pool.usable_router if not reasons else None  # what was lost may have been lost by the router
            answering = server.client.generate(
                request, request_id, sorted(self.stop_token_ids), self._request_timeout_s, router
            )
            try:
                completion = await pool.ask(server, answering)
            except ServerUnreachableError as error:
                reasons.append(str(error))
                for holder in [server] if router is None else pool.servers:
                    pool.suspect(holder, error)
                    self._spawn(self._tell(pool, holder, holder.client.cancel(request_id)))
            except asyncio.CancelledError:
                for holder in [server] if router is None else pool.servers:
                    self._spawn(self._tell(pool, holder, holder.client.cancel(request_id)))
                raise
            else:
                if completion.finish_reason != "abort" or number < self._abort_below:
                    return completion
                # Nobody asked for it: the server shuts down, or drops what it has no memory for.
                reasons.append(f"{server.name} ended the response by itself")
                pool.suspect(server, ServerError(reasons[-1]))
            finally:
                del self._in_flight[number]
            self._load.num_resent += 1
        raise ServerError(
            f"sample {request.sample_id!r} was sent {_MAX_SENDS} times and never answered:\n" + "\n".join(reasons)
        )

    async def _choose(self, pool: ServerPool, group_id: int, number: int) -> Server | None:
        """A server, to be asked before the next await; None once the request has been aborted."""
        while number >= self._abort_below:
            if (server := pool.choose(group_id)) is not None:
                return server
            waiting = asyncio.ensure_future(pool.wait_until_one_may_generate())
            self._waiting.add(waiting)
            try:
                await waiting
            except asyncio.CancelledError:
                current = asyncio.current_task()
                if current is not None and current.cancelling():
                    raise
            finally:
                self._waiting.discard(waiting)
        return None

    def _begin_abort(self, pool: ServerPool) -> None:
        self._abort_below = next(self._numbers)
        for waiting in self._waiting:
            waiting.cancel()
        for server in pool.servers:
            self._spawn(self._tell(pool, server, server.client.abort_all()))
        self._spawn(self._abort_late_ones(pool))

    async def _abort_late_ones(self, pool: ServerPool) -> None:
        """Requests that were on their way when a server ended all that it knew."""
        while late := [place for number, place in self._in_flight.items() if number < self._abort_below]:
            await asyncio.sleep(_ABORT_AGAIN_S)
            for server, request_id in late:
                await self._tell(pool, server, server.client.cancel(request_id))

    async def _tell(self, pool: ServerPool, server: Server, telling: Awaitable[None]) -> None:
        try:
            await telling
        except ServerError as error:
            pool.suspect(server, error)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- weights and memory -----------------------------------------------------------------------------------------

    def give(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine`. Servers prove by checksums and log-probs that they hold and use these weights."""
        if self._given == version:
            return
        sequences = canary_sequences(policy.vocab_size, self._num_canaries, self._canary_tokens)
        expected = policy.score(sequences) if sequences else []
        if self.colocated:
            with self.collectively():
                give_back_caches()  # an update's activations, which the servers' weights come in the place of
        self.update_weights(policy.weights(), version)
        if self.colocated:
            self._lend(policy)
            self.resume_memory()
        if sequences:
            self.check_log_probs(sequences, expected)
        self._given = version

    def take_back(self, policy: Policy) -> None:
        """See `RolloutEngine`; colocated servers alone have borrowed anything."""
        if self.colocated and self._given is not None:
            self.release_memory()
            policy.onload()
            self._given = None

    def _lend(self, policy: Policy) -> None:
        """Give all memory away, on every rank before any server takes it: one rank owns the servers of all."""
        with self.collectively():
            policy.offload()
            give_back_caches()  # also the buckets that weights went over in

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Hand new weights to all servers and prove by checksums that they arrived. Collective.

        Requests in flight wait meanwhile and go on with the new weights; their samples say from which token on. Where
        memory was released, the weights' part is resumed first, and the caches' part is left to `resume_memory`.

        Args:
            tensors: all weights under their Hugging Face names; every rank drains it.
            policy_version: written into samples from now on.

        Raises:
            ServerError: on every rank, if servers refuse, or one rank has none left. No server generates then before
                an update has succeeded.
        """
        with self.collectively():
            if self.sync is None or self.pool is None:
                self._pack_along(iter(tensors))
            else:
                self._last_sync = self.sync.run(
                    tensors,
                    str(policy_version),
                    keep_held=self._memory != "resident",
                    beforehand=partial(self._take_memory_of_weights, self.pool),
                )
        if self.sync is not None:
            self.sync.forget_older_snapshots()  # no rank reads them any more
        if self._memory == "released":
            self._memory = "weights only"
        self.policy_version = policy_version

    def _pack_along(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        try:
            if self._packers is not None:
                self._packers.follow(stream)
        finally:
            for _ in stream:
                pass

    def _take_memory_of_weights(self, pool: ServerPool) -> None:
        if self._memory == "released":
            self._run(pool.on_held(lambda client: client.resume_memory("weights")))

    def release_memory(self) -> None:
        """Give the servers' memory, weights and caches, to the actor beside them. Nothing is in flight. Collective.

        Generation is paused first: a request that came in meanwhile, if only a question after a server's health, would
        be computed in memory that is gone, and SGLang's scheduler dies of being asked for its memory while it works.
        """
        with self.collectively():
            if self.pool is not None:
                self._run(self.pool.hold())
                self._run(self.pool.on_held(_pause_and_release))
        self._memory = "released"

    def resume_memory(self) -> None:
        """Take memory for the caches again, after `update_weights`; the servers can generate then. Collective."""
        assert self._memory != "released", "the weights come first: update_weights()"
        with self.collectively():
            if self.pool is not None and self._memory == "weights only":
                self._run(self.pool.on_held(_resume_cache_and_go_on))
                self._run(self.pool.let_go_all())
        self._memory = "resident"

    def check_log_probs(self, sequences: Sequence[Sequence[int]], actor: Sequence[Sequence[float]]) -> None:
        """Compare every server's log-probs of fixed sequences with the actor's. Collective.

        Args:
            sequences: token ids, the same on every rank, such as `canary.canary_sequences`.
            actor: the actor's log-probs at temperature 1 of each sequence's tokens from the second on.

        Raises:
            ServerError: on every rank, if one server's differ by more than the tolerance.
        """
        with self.collectively():
            if self.pool is not None:
                self._last_canary = self._run(self._compare(self.pool, sequences, actor))

    async def _compare(
        self, pool: ServerPool, sequences: Sequence[Sequence[int]], actor: Sequence[Sequence[float]]
    ) -> LogProbDifference:
        worst = LogProbDifference(0.0, 0.0)
        for server in [server for server in pool.servers if server.state is State.READY]:
            found = await server.client.score(sequences, self._request_timeout_s)
            try:
                difference = compare_log_probs(server.name, actor, found, self._canary_tolerance)
            except CanaryError as error:
                await pool.set_stale(server, str(error))
                raise
            worst = max(worst, difference, key=lambda each: each.mean)
        return worst

    @contextmanager
    def collectively(self) -> Iterator[None]:
        """Let an error on one rank be raised on all of them, and nobody go on before all are done. Collective."""
        problem = ""
        try:
            yield
        # A server's error, another rank's and a GPU out of memory are all of the last kind.
        except (CanaryError, ValueError, OSError, RuntimeError) as error:
            problem = str(error) or type(error).__name__
            cause: BaseException | None = error
        else:
            cause = None
        problems = [text for text in self._agree(problem) if text]
        if problems:
            raise ServerError("\n".join(dict.fromkeys(problems))) from cause

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None, "a rank with servers has a loop"
        return self._loop.run(coroutine)

    # --- metrics ----------------------------------------------------------------------------------------------------

    def metrics(self) -> Metrics:
        """What generation and the last handover took since this was last called; to be merged over ranks."""
        if self.pool is None:
            return {}
        load, self._load = self._load, _Load()
        metrics: Metrics = {
            "rollout/requests_resent": Sum(load.num_resent),
            "rollout/server_restarts": Sum(self.pool.num_restarts),
            "rollout/cached_prompt_share": Mean(load.num_cached_tokens, load.num_prompt_tokens),
        }
        if load.ends:
            ends = sorted(load.ends)
            metrics["time_s/rollout_slowest_sample"] = Max(max(load.durations))
            metrics["time_s/rollout_tail"] = Max(ends[-1] - ends[int(_TAIL_SHARE * (len(ends) - 1))])
        if self._last_sync is not None:
            report = self._last_sync
            metrics["weight_sync/transfer_s"] = Max(report.transfer_s)
            metrics["weight_sync/check_s"] = Max(report.check_s)
            metrics["weight_sync/gigabytes_per_s"] = Min(report.gigabytes_per_s)
            metrics["weight_sync/gigabytes"] = Max(report.num_bytes / 1e9)
        if self._last_canary is not None:
            metrics["canary/log_prob_difference/mean"] = Max(self._last_canary.mean)
            metrics["canary/log_prob_difference/max"] = Max(self._last_canary.max)
        return metrics


async def _pause_and_release(client: InferenceServer) -> None:
    await client.pause()
    await client.release_memory()


async def _resume_cache_and_go_on(client: InferenceServer) -> None:
    await client.resume_memory("cache")
    await client.resume()


def _turn(request: GenerationRequest, completion: Completion) -> Turn:
    start = len(request.prefix)
    segments = policy_segments(
        torch.tensor(completion.token_ids, dtype=torch.int64),
        torch.tensor(completion.log_probs, dtype=torch.float32),
        [(_policy_version(version), start + first, start + stop) for version, first, stop in completion.version_spans],
        start,
    )
    return Turn(request, segments, completion.finish_reason)


def _policy_version(version: str) -> int:
    if not version.isdecimal():
        raise ServerError(f"a server generated with weights {version!r} that were not handed over by update_weights()")
    return int(version)
