"""A microbatch and the objectives under which its loss is taken, on any device.

Shifts and mismatches are large enough to be clipped, filtered and masked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import FipoConfig, ShadowConfig
from megatron_fipo.parallel import cp_layout
from megatron_fipo.parallel.batch import shard_batch
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.trajectory import Trajectory
from tests.losses import CORRECTIONS

LENGTHS = (5, 33, 64, 1100)
"""Of responses: less than a block, a token more than one, two blocks, and so many that blocks have blocks."""

AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
BASE = FipoConfig(influence_min=0.8, sequence_sum_tokens=100, rollout_ratio_min=0.9, rollout_ratio_max=1.1)
SHADOWS = {
    "own": ShadowConfig(),
    "tau_8": ShadowConfig(half_life_tokens=8.0, influence_min=0.5, influence_max=2.0),
    "tau_256": ShadowConfig(half_life_tokens=256.0, safety_ratio=2.0),
    "strict": ShadowConfig(dual_clip=2.0),
    "unfiltered": ShadowConfig(filter_extreme_ratios=False, influence_min=0.0),
}
OBJECTIVES = {
    "fipo": BASE,
    "behaviour in Future-KL": replace(BASE, future_kl_reference="behaviour"),
    "dapo": replace(BASE, future_kl=False),
    "shadows": replace(BASE, shadow=SHADOWS),
    "dapo with shadows": replace(BASE, future_kl=False, shadow=SHADOWS),
    "kl and entropy": replace(BASE, kl_coefficient=0.1, entropy_coefficient=0.01),
    **{
        f"{kind}, {aggregation}": replace(BASE, rollout_correction=kind, loss_aggregation=aggregation)
        for kind in CORRECTIONS
        for aggregation in AGGREGATIONS
    },
}


def whole_batch(cp_size: int) -> PackedBatch:
    """Four responses."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, length in enumerate(LENGTHS):
        rollout = -1.0 - 0.1 * torch.randn(length, generator=generator)
        samples.append(
            Trajectory.of_response(0, index, torch.ones(3).long(), torch.ones(length).long(), rollout, "stop")
        )
        samples[-1].advantage = 1.0 - index
    batch = build_packed_batch(samples, range(len(samples)), pad_multiple=2 * cp_size, pad_token_id=0, version=2)
    return replace(batch, old_log_probs=torch.where(batch.response_mask, -1.0, 0.0))


def inputs(batch: PackedBatch, group: dist.ProcessGroup) -> tuple[PackedBatch, Tensor, Tensor]:
    """(this rank's rows, log-probs, entropy), on the CPU."""
    num_tokens = len(batch.labels)
    generator = torch.Generator().manual_seed(1)
    log_probs = -1.0 + 0.2 * torch.randn(num_tokens, generator=generator)
    log_probs[::17] += 1.4
    log_probs[::97] += 2.6
    entropy, reference = torch.rand(2, num_tokens, generator=generator)
    rows = cp_layout.local_indices(batch.layout.cu_seqlens_padded, group.size(), group.rank())
    local = shard_batch(batch, group, torch.device("cpu"))
    assert batch.old_log_probs is not None
    local.old_log_probs, local.reference_log_probs = batch.old_log_probs[rows], -1.0 - reference[rows]
    return local, log_probs[rows], entropy[rows]


def loss_and_gradients(
    batch: PackedBatch, log_probs: Tensor, entropy: Tensor, config: FipoConfig, group: dist.ProcessGroup
) -> tuple[LossOutput, dict[str, Any]]:
    """Forward and backward; all that came of it. Collective."""
    log_probs, entropy = log_probs.clone().requires_grad_(), entropy.clone().requires_grad_()
    loss = Objective(config, group)(log_probs, entropy, batch)
    loss.loss_sum.backward()
    values = {
        "loss": loss.loss_sum.detach(),
        "normalizer": loss.normalizer,
        "token_loss": loss.token_loss,
        "future_kl": loss.future_kl,
        "mask": loss.final_mask,
        "gradient": log_probs.grad,
        "entropy's gradient": entropy.grad,
    }
    return loss, values
