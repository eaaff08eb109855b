"""The objective as the actor is handed it: a microbatch's log-probs in, its loss out, whoever holds the other rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.config import FipoConfig
from megatron_fipo.parallel.sharded_sequences import ShardedSequences
from megatron_fipo.rl.objective import LossOutput, policy_loss
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.token_values import TokenValues

Watch: TypeAlias = Callable[[PackedBatch, TokenValues, LossOutput], None]
"""Sees what a microbatch's loss was made of, and the loss."""


@dataclass(frozen=True)
class Objective:
    """`policy_loss` of a rank's rows; Future-KL and the sequence filter see whole sequences."""

    config: FipoConfig
    cp_group: ProcessGroup
    """The ranks that share the sequences of each batch."""
    watch: Watch | None = None
    """Called with each loss."""

    def __call__(self, log_probs: Tensor, entropy: Tensor, batch: PackedBatch) -> LossOutput:
        """The loss of a microbatch. Differentiable in log_probs and entropy.

        Collective over `cp_group` where objective.future_kl is set, or shadow, or a rollout_correction that masks.
        Nothing is read from the batch's device nor sent there.

        Args:
            log_probs, entropy: float32 [T_local].
            batch: this rank's rows of the microbatch, from `shard_batch`, old_log_probs set.
        """
        assert batch.old_log_probs is not None, "old log-probs are taken before the step's first update"
        assert batch.segments is not None, "the batch was not sharded"
        tokens = TokenValues(
            log_probs,
            batch.old_log_probs,
            batch.advantages,
            batch.response_mask,
            reference_log_probs=batch.reference_log_probs,
            entropy=entropy,
            rollout_log_probs=batch.rollout_log_probs,
            staleness_steps=batch.staleness_steps,
        )
        sequences = ShardedSequences(batch.sequence_ids, batch.segments, self.cp_group, batch.response_token_counts)
        loss = policy_loss(tokens, sequences, self.config)
        if self.watch is not None:
            self.watch(batch, tokens, loss)
        return loss
