"""The policy loss of a microbatch that context parallelism has sharded."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_fipo.config import FipoConfig
from megatron_fipo.parallel import cp_suffix_sum, exchange
from megatron_fipo.rl.objective import LossOutput, policy_loss
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.rollout_correction import SumOverShards


def sharded_policy_loss(
    log_probs: Tensor, entropy: Tensor, batch: PackedBatch, objective: FipoConfig, cp_group: ProcessGroup
) -> LossOutput:
    """`policy_loss` of this rank's rows; Future-KL and the sequence filter see whole sequences.

    Collective over `cp_group` where objective.future_kl is set, or a rollout_correction that masks. Differentiable in
    log_probs and entropy.

    Args:
        log_probs, entropy: float32 [T_local].
        batch: this rank's rows of the microbatch, from `shard_batch`, old_log_probs set. Nothing is read from its
            device nor sent there.
    """
    assert batch.old_log_probs is not None, "old log-probs are taken before the step's first update"
    assert batch.segments is not None, "the batch was not sharded"
    return policy_loss(
        log_probs,
        batch.old_log_probs,
        batch.advantages,
        batch.response_mask,
        batch.lengths.cu_seqlens_padded,
        objective,
        cp_suffix_sum.sharded_suffix_sum(objective.half_life_tokens, cp_group, batch.segments, batch.sequence_ids),
        sequence_ids=batch.sequence_ids,
        response_token_counts=batch.response_token_counts,
        counts_sequences=cp_group.rank() == 0,
        reference_log_probs=batch.reference_log_probs,
        entropy=entropy,
        rollout_log_probs=batch.rollout_log_probs,
        sum_over_shards=sum_over_shards(cp_group),
    )


def sum_over_shards(cp_group: ProcessGroup) -> SumOverShards:
    """Adds [S, …] up over the context-parallel ranks, in rank order, so that every rank has the same bits.

    Collective over `cp_group` (one all-gather).
    """

    def summed(own: Tensor) -> Tensor:
        return torch.stack(exchange.all_gather_tensors(own, cp_group)).sum(0)

    return summed
