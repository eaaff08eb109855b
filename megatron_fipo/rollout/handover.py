"""Between training and rollouts: weights go over, are proven to have arrived, and memory changes hands."""

from __future__ import annotations

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import Config
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel.device_memory import give_back_caches
from megatron_fipo.rollout.in_process.engine import InProcessEngine
from megatron_fipo.rollout.servers.canary import canary_sequences
from megatron_fipo.rollout.servers.engine import ServerEngine

_CANARY_TOKENS = 64


class Handover:
    """Gives each policy to the rollout engine. Its methods are collective over all ranks."""

    def __init__(self, config: Config, actor: Actor, engine: InProcessEngine | ServerEngine) -> None:
        self._config, self._actor, self._engine = config, actor, engine
        self._version_at_rollout: int | None = None

    def start(self) -> None:
        """Start the engine's servers.

        They take for their caches what memory is free when they start. So colocated ones start while the actor's is
        lent, as it is whenever they generate, and give theirs back before the actor takes its own again.

        Raises:
            ServerError: on every rank, in the server's words, if one does not come up.
        """
        engine = self._engine
        if not isinstance(engine, ServerEngine):
            return
        if engine.colocated:
            self._lend(engine)
        engine.start()
        if engine.colocated:
            engine.release_memory()
            self._actor.onload()

    def to_rollout(self, policy_version: int) -> None:
        """Bring the actor's weights to the engine, if it has not these; it can generate with them when this returns.

        Servers prove by checksums and log-probs that they hold and use these weights. Colocated ones get the actor's
        memory.

        Raises:
            ServerError: on every rank, if weights did not arrive, or not these.
        """
        if self._version_at_rollout == policy_version:
            return
        self._give(policy_version)
        self._version_at_rollout = policy_version

    def _give(self, policy_version: int) -> None:
        engine, num_sequences = self._engine, self._config.servers.canary_sequences
        if not isinstance(engine, ServerEngine):
            engine.update_weights(self._actor.weights(), policy_version)
            return
        expected: list[list[float]] = []
        sequences = canary_sequences(self._actor.shape.vocab_size, num_sequences, self._canary_tokens)
        if sequences:
            expected = self._actor.score(sequences)
        if engine.colocated:
            with engine.collectively():
                give_back_caches()  # an update's activations, which the servers' weights come in the place of
        engine.update_weights(self._actor.weights(), policy_version)
        if engine.colocated:
            self._lend(engine)
            engine.resume_memory()
        if sequences:
            engine.check_log_probs(sequences, expected)

    def _lend(self, engine: ServerEngine) -> None:
        """Give all memory away, on every rank before any server takes it: one rank owns the servers of all."""
        with engine.collectively():
            self._actor.offload()
            give_back_caches()  # also the buckets that weights went over in

    def to_training(self) -> None:
        """The actor can compute and be saved when this returns: colocated servers give it their memory back.

        Nothing is in flight. What they generate with next goes over anew.
        """
        if isinstance(self._engine, ServerEngine) and self._engine.colocated and self._version_at_rollout is not None:
            self._engine.release_memory()
            self._actor.onload()
            self._version_at_rollout = None

    @property
    def metrics(self) -> Metrics:
        """This rank's part of what generation and the last handover took; to be merged over ranks."""
        return self._engine.metrics() if isinstance(self._engine, ServerEngine) else {}

    @property
    def _canary_tokens(self) -> int:
        rollout = self._config.rollout
        return min(_CANARY_TOKENS, rollout.max_prompt_tokens + rollout.max_response_tokens)
