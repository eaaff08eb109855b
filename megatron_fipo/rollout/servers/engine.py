"""The rollout engine over inference servers: brings them up, gives them weights and memory, and has them generate."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

from torch import Tensor

from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel.device_memory import give_back_caches
from megatron_fipo.rollout.engine import ALL_PROMPTS, GenerationRequest, Policy, Share, Turn, check_request
from megatron_fipo.rollout.servers.api import InferenceServer
from megatron_fipo.rollout.servers.cache_proof import CacheProof, cache_canary
from megatron_fipo.rollout.servers.completions import turn_of
from megatron_fipo.rollout.servers.event_loop import EventLoopThread
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.joining import Joining
from megatron_fipo.rollout.servers.packers import Packers
from megatron_fipo.rollout.servers.pool import ServerPool
from megatron_fipo.rollout.servers.proof import CanaryError, LogProbDifference, canary_sequences, prove_log_probs
from megatron_fipo.rollout.servers.sending import Sender
from megatron_fipo.rollout.servers.sync import SyncReport, WeightSync

T = TypeVar("T")


@dataclass
class OwnedServers:
    """The parts of an engine on a rank that owns servers."""

    pool: ServerPool
    """The servers."""
    loop: EventLoopThread
    """The event loop on which the pool runs."""
    sender: Sender
    """Shares requests out over them."""
    sync: WeightSync
    """Brings weights in."""


@dataclass(frozen=True)
class EngineSettings:
    """How a `ServerEngine` behaves, the same on every rank."""

    vocab_size: int
    """Number of token ids. Servers crash on larger ids, so they are refused here."""
    stop_token_ids: frozenset[int]
    """Tokens that end a response."""
    score_timeout_s: float
    """Longest wait for a server's log-probs of the canary."""
    canary_tolerance: float
    """Largest mean |log-prob difference| to the policy."""
    num_canaries: int = 0
    """Sequences on which `give` compares servers with the policy; 0 compares checksums only."""
    canary_tokens: int = 0
    """Length of each of them."""
    cache_canary_tokens: int = 0
    """Length of the sequence on which servers show that they reuse nothing of older weights, if num_canaries is not 0;
    at least 2."""
    colocated: bool = False
    """Whether servers give their memory away while the actor trains."""


class ServerEngine:
    """A `RolloutEngine` over the servers that this process owns.

    Methods may be called from any thread, and `generate` from any event loop; all HTTP runs in the pool's own thread.
    On a rank that owns no servers the engine takes part in what is collective, and generates nothing.

    Args:
        owned: the servers that this rank owns, not started yet; None where it owns none.
        settings: how the engine behaves.
        agree: exchanges a problem ("" for none) with all ranks and returns everyone's, so that a failure on one stops
            all of them, with the same words. Collective.
        share: this rank's share of the prompts; None where it owns no servers.
        packers: on a rank that owns no servers, packs the weights for those on its GPU; None where there are none.
        check_before_start: raises ServerError if servers must not be started, such as with another NCCL than ours.
        joining: finds servers that come and go while the run goes on; None where none may.
    """

    repeatable = False

    def __init__(
        self,
        owned: OwnedServers | None,
        settings: EngineSettings,
        *,
        agree: Callable[[str], Sequence[str]],
        share: Share | None = ALL_PROMPTS,
        packers: Packers | None = None,
        check_before_start: Callable[[], None] = lambda: None,
        joining: Joining | None = None,
    ) -> None:
        self.owned, self.share = owned, share
        self.stop_token_ids = settings.stop_token_ids
        self._settings, self._agree = settings, agree
        self._packers, self._check_before_start, self._joining = packers, check_before_start, joining
        self._own_capacity = self.capacity
        self._given: int | None = None
        self._memory: Literal["resident", "released", "weights only"] = "resident"
        self._last_sync: SyncReport | None = None
        self._last_canary: LogProbDifference | None = None
        self._caches: CacheProof | None = None
        if owned is not None:
            self._caches = CacheProof(owned.pool, settings.canary_tolerance, settings.score_timeout_s)
        self._is_closed = False

    def start(self, policy: Policy | None = None) -> None:
        """Start the servers, or attach to them. Collective.

        Servers size their caches by the memory that is free when they start. So colocated servers start while the
        policy's memory is lent, as it is whenever they generate, and give it back before the policy takes it again.

        Args:
            policy: the policy that is trained on the servers' GPUs; None if the servers have GPUs of their own.

        Raises:
            ServerError: on every rank, with what the server itself reported, if one does not come up.
        """
        lender = policy if self._settings.colocated else None
        if lender is not None:
            self._lend(lender)
        with self.collectively():
            if self.owned is not None:
                self._check_before_start()
                self._run(self.owned.pool.start())
        if lender is not None:
            self.release_memory()
            lender.onload()

    def close(self) -> None:
        """End the servers that were started here. Not collective: a rank that fails alone ends its own, too.

        Raises:
            DiskError: if the weights could not be written for servers that start anew, and nobody has heard of it yet.
        """
        if self._is_closed:
            return
        self._is_closed = True
        if self.owned is not None:
            try:
                self.owned.sync.close()
                self._run(self.owned.pool.close())
                self.owned.loop.stop()
            finally:  # while it is written the servers have ended
                self.owned.sync.finish_snapshot()

    # --- generating -------------------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """See `RolloutEngine`. It changes as servers join and leave."""
        return 0 if self.owned is None else self.owned.sender.slots.number

    async def generate(self, request: GenerationRequest) -> Turn:
        """Generate one response.

        A request whose answer was lost is sent again: sampling has no side effects, and only one answer is used.

        Returns:
            The turn. With a prefix it holds what follows that.

        Raises:
            ValueError: if the request breaks a rule; the message names it.
            ServerError: if a server refuses the request, in its own words, or none is left to send it to.
            RuntimeError: if the engine is closed, lacks memory, or owns no servers.
        """
        if self._is_closed:
            raise RuntimeError("the rollout engine is closed")
        if self._memory != "resident":
            raise RuntimeError("the servers' memory is released; update_weights() and resume_memory() come first")
        if self.owned is None:
            raise RuntimeError("this rank owns no servers; prompts are shared out over the ranks that do")
        check_request(request, self._settings.vocab_size, self.stop_token_ids)
        answering = self.owned.sender.complete(request, sorted(self.stop_token_ids))
        return turn_of(request, await self.owned.loop.run_here(answering), self.stop_token_ids)

    def abort(self) -> None:
        """End every request in flight; each returns what it has, finish_reason "abort". Safe in a signal handler."""
        if self.owned is not None:
            self.owned.loop.call_soon(self.owned.sender.abort)

    def forget_load(self) -> None:
        """See `RolloutEngine`."""
        if self.owned is not None:
            self.owned.loop.call(self.owned.sender.forget_load)

    def metrics(self) -> Metrics:
        """What generation and the last handover took since this was last called; to be merged over ranks."""
        if self.owned is None:
            return {}
        metrics = self.owned.loop.call(self.owned.sender.take_metrics)
        for report in (self._last_sync, self._last_canary, self._caches):
            metrics |= report.metrics() if report is not None else {}
        return metrics

    # --- weights and memory -----------------------------------------------------------------------------------------

    def give(self, policy: Policy, version: int) -> None:
        """See `RolloutEngine`. Servers prove that they hold and use these weights, and nothing of older ones."""
        if self._given == version:
            return
        settings = self._settings
        sequences = canary_sequences(policy.vocab_size, settings.num_canaries, settings.canary_tokens)
        cached = cache_canary(policy.vocab_size, settings.cache_canary_tokens)
        expected = policy.score([*sequences, cached]) if sequences else []
        if settings.colocated:
            with self.collectively():
                give_back_caches()  # the servers' weights take the place of an update's activations
        elif self._given is not None:  # a server that a killed run left paused answers only after the first update
            self._warm_caches(policy)
        self._look_who_has_come()
        self.update_weights(policy.weights(), version)
        if settings.colocated:
            self._lend(policy)
            self.resume_memory()
        if sequences:
            self.check_log_probs(sequences, expected[:-1])
            self.check_caches(cached, expected[-1])
        if self.owned is not None:
            self._run(self.owned.pool.admit())
            self._fit_capacity(self.owned)
        self._given = version

    def take_back(self, policy: Policy) -> None:
        """See `RolloutEngine`. Only colocated servers have borrowed anything."""
        if self._settings.colocated and self._given is not None:
            self._warm_caches(policy)  # later they have no memory for it
            self.release_memory()
            policy.onload()
            self._given = None

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], policy_version: int) -> None:
        """Hand new weights to all servers and prove by checksums that they arrived. Collective.

        Requests in flight wait meanwhile and go on with the new weights; their segments say from which token on. Where
        memory was released, the weights' part is resumed first, and the caches' part is left to `resume_memory`.

        Args:
            tensors: all weights under their Hugging Face names; every rank drains it.
            policy_version: written into segments from now on.

        Raises:
            ServerError: on every rank, if servers refuse, or one rank has none left. No server generates then before
                an update has succeeded.
        """
        with self.collectively():
            if self.owned is None:
                self._pack_along(iter(tensors))
            else:
                self._last_sync = self.owned.sync.run(
                    tensors,
                    str(policy_version),
                    keep_held=self._memory != "resident",
                    beforehand=partial(self._take_memory_of_weights, self.owned.pool),
                )
        if self.owned is not None:
            self.owned.sync.forget_older_snapshots()  # no rank reads them any more
        if self._memory == "released":
            self._memory = "weights only"

    def release_memory(self) -> None:
        """Give the servers' memory, weights and caches, to the actor beside them. Nothing is in flight. Collective.

        Generation is paused first: a request that came in meanwhile, even a health probe, would be computed in memory
        that is gone, and SGLang's scheduler crashes if it is asked for its memory while it works.
        """
        with self.collectively():
            if self.owned is not None:
                self._run(self.owned.pool.hold())
                self._run(self.owned.pool.on_held(_pause_and_release))
        self._memory = "released"

    def resume_memory(self) -> None:
        """Take memory for the caches again, after `update_weights`; the servers can generate then. Collective."""
        assert self._memory != "released", "the weights come first: update_weights()"
        with self.collectively():
            if self.owned is not None and self._memory == "weights only":
                self._run(self.owned.pool.on_held(_resume_cache_and_go_on))
                self._run(self.owned.pool.let_go_all())
        self._memory = "resident"

    def check_log_probs(self, sequences: Sequence[Sequence[int]], actor: Sequence[Sequence[float]]) -> None:
        """Compare every server's log-probs of fixed sequences with the actor's. Collective.

        Args:
            sequences: token ids, the same on every rank, such as `proof.canary_sequences`.
            actor: the actor's log-probs at temperature 1 of each sequence's tokens from the second on.

        Raises:
            ServerError: on every rank, if one server's differ by more than the tolerance.
        """
        settings = self._settings
        with self.collectively():
            if self.owned is not None:
                self._last_canary = self._run(
                    prove_log_probs(
                        self.owned.pool, sequences, actor, settings.canary_tolerance, settings.score_timeout_s
                    )
                )

    def check_caches(self, sequence: Sequence[int], actor: Sequence[float]) -> None:
        """Have every server show that it reuses no keys and values of older weights. Collective.

        Args:
            sequence: token ids, the same on every rank, such as `cache_proof.cache_canary`; asked about for the first
                time since the update.
            actor: the actor's log-probs at temperature 1 of the sequence's tokens from the second on.

        Raises:
            ServerError: on every rank, if one server found the sequence in its cache, or gives other log-probs.
        """
        with self.collectively():
            if self._caches is not None:
                self._run(self._caches.prove(sequence, actor))

    def _warm_caches(self, policy: Policy) -> None:
        """Bring the sequence of `check_caches` into the servers' caches, where the next update must forget it.

        Collective.
        """
        settings = self._settings
        if settings.num_canaries:
            with self.collectively():
                if self._caches is not None:
                    sequence = cache_canary(policy.vocab_size, settings.cache_canary_tokens)
                    self._run(self._caches.warm(sequence))

    def _look_who_has_come(self) -> None:
        """Take servers in that have joined the run since the last handover, and let go who has left. Collective."""
        if self._joining is not None:
            now = self._joining.look()
            with self.collectively():
                if self.owned is not None:
                    self._run(self._joining.take_in(self.owned.pool, now))

    def _fit_capacity(self, owned: OwnedServers) -> None:
        """Let as many requests be in flight as there are servers for, those that have joined among them."""
        each = owned.pool.settings.max_concurrent_requests
        owned.loop.call(lambda: owned.sender.slots.change(self._own_capacity + each * owned.pool.num_joined))

    @contextmanager
    def collectively(self) -> Iterator[None]:
        """Raise an error of one rank on all of them, and let no rank continue before all are done. Collective."""
        problem = ""
        try:
            yield
        # A server's error, another rank's and a GPU out of memory are RuntimeErrors.
        except (CanaryError, ValueError, OSError, RuntimeError) as error:
            problem = str(error) or type(error).__name__
            cause: BaseException | None = error
        else:
            cause = None
        problems = [text for text in self._agree(problem) if text]
        if problems:
            raise ServerError("\n".join(dict.fromkeys(problems))) from cause

    def _lend(self, policy: Policy) -> None:
        """Give all memory away, on every rank before any server takes it: one rank owns the servers of all."""
        with self.collectively():
            policy.offload()
            give_back_caches()  # the buckets that weights went over in are among them

    def _take_memory_of_weights(self, pool: ServerPool) -> None:
        if self._memory == "released":
            self._run(pool.on_held(lambda client: client.resume_memory("weights")))

    def _pack_along(self, stream: Iterator[tuple[str, Tensor]]) -> None:
        try:
            if self._packers is not None:
                self._packers.follow(stream)
        finally:
            for _ in stream:
                pass

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self.owned is not None, "the caller looked"
        return self.owned.loop.run(coroutine)


async def _pause_and_release(client: InferenceServer) -> None:
    await client.pause()
    await client.release_memory()


async def _resume_cache_and_go_on(client: InferenceServer) -> None:
    await client.resume_memory("cache")
    await client.resume()
