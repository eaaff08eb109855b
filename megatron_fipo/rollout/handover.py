"""Between training and rollouts: weights go over, are proven to have arrived, and memory changes hands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import Config, pad_multiple
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel.batch import padded_tokens, shard_batch
from megatron_fipo.parallel.device_memory import give_back_caches
from megatron_fipo.parallel.groups import device
from megatron_fipo.parallel.step_log_probs import gather_old_log_probs
from megatron_fipo.rl.packing import FILLER, build_packed_batch
from megatron_fipo.rl.trajectory import Sample
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
            expected = actor_log_probs(self._actor, self._config, sequences)
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


def actor_log_probs(actor: Actor, config: Config, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """The actor's log-probs, at temperature 1, of each sequence's tokens from the second on.

    Collective over all ranks; the same on every rank.
    """
    ranks = actor.groups
    samples = [
        Sample(
            prompt_id=index,
            sample_index=0,
            prompt_ids=torch.tensor(sequence[:1]),
            response_ids=torch.tensor(sequence[1:]),
            rollout_log_probs=torch.zeros(len(sequence) - 1),
            finish_reason="length",
        )
        for index, sequence in enumerate(sequences)
    ]
    indices = range(len(samples))
    total = padded_tokens(samples, indices, config)
    packed = build_packed_batch(samples, indices, pad_multiple(config), 0, total_tokens=total)
    batch = shard_batch(packed, ranks.cp, device())
    count = config.parallel.pp if config.parallel.virtual_pp else 1  # the interleaved schedule takes no fewer
    found = actor.log_probs([batch] * count, temperature=1.0)
    if found:
        batch.old_log_probs = found[0]
    if ranks.dp.rank():  # every data-parallel rank has computed the same
        batch.sample_indices = [FILLER] * len(batch.sample_indices)
    whole = gather_old_log_probs([[batch]], ranks)
    return [whole[index][1].tolist() for index in range(len(samples))]
