"""Between training and rollouts: weights go over, are proven to have arrived, and memory changes hands."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import Config, pad_multiple
from megatron_fipo.parallel.batch import padded_tokens, shard_batch
from megatron_fipo.parallel.groups import device
from megatron_fipo.parallel.step_log_probs import gather_old_log_probs
from megatron_fipo.rl.packing import FILLER, build_packed_batch
from megatron_fipo.rl.trajectory import Trajectory


class ScoredPolicy:
    """The actor as a `Policy`."""

    def __init__(self, actor: Actor, config: Config) -> None:
        self._actor, self._config = actor, config
        self.vocab_size = actor.shape.vocab_size
        self.weights, self.offload, self.onload = actor.weights, actor.offload, actor.onload

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `Policy`."""
        return actor_log_probs(self._actor, self._config, sequences)


def actor_log_probs(actor: Actor, config: Config, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """The actor's log-probs, at temperature 1, of each sequence's tokens from the second on.

    Collective over all ranks; the same on every rank.
    """
    ranks = actor.groups
    samples = [
        Trajectory.of_response(
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
