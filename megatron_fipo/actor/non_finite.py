"""A loss or a gradient that is not a finite number: it ends the update on every rank, and is traced to its samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.packed_batch import PackedBatch


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the optimizer step was not taken."""


@dataclass(frozen=True)
class ComputedLoss:
    """What a microbatch's loss was computed from, kept until the loss is known to be finite.

    Attributes:
        loss_sum: 0-d.
        outputs: what the model's head gave, by name, [T_local] each.
        batch: the microbatch.
    """

    loss_sum: Tensor
    outputs: Mapping[str, Tensor]
    batch: PackedBatch

    def describe(self) -> str:
        """Name the samples whose loss is not finite, and the first of its inputs that is not finite either."""
        batch = self.batch
        inputs = {
            **{name.replace("_", "-"): values for name, values in self.outputs.items()},
            "old log-probs": batch.old_log_probs,
            "reference log-probs": batch.reference_log_probs,
            "advantages": batch.advantages,
        }
        what, samples = "finite inputs of", batch.sample_indices
        for name, values in inputs.items():
            if values is None:
                continue
            bad = batch.sequence_ids[~torch.isfinite(values) & batch.response_mask].unique().tolist()
            if bad:
                what, samples = f"{name} of", [batch.sample_indices[index] for index in bad]
                break
        return f"the loss is {float(self.loss_sum)}; {what} samples {samples[:8]} of the step's batch."


def check_losses(losses: Sequence[ComputedLoss], step: int, ranks: ParallelGroups) -> None:
    """Refuse losses that are not finite. Collective over all ranks.

    Raises:
        NonFiniteError: on every rank, if any rank's loss is not finite, with the account of the first such rank.
    """
    found = [loss.describe() for loss in losses if not torch.isfinite(loss.loss_sum)]
    if not exchange.any_rank(bool(found), ranks.world):
        return
    accounts = exchange.all_gather_objects(found, ranks.world)
    rank = next(rank for rank, account in enumerate(accounts) if account)
    raise NonFiniteError(f"step {step}, rank {rank}: {accounts[rank][0]} No optimizer step was taken.")


def check_gradients(grad_norm: float, models: Sequence[nn.Module], step: int, rank: int) -> None:
    """Refuse gradients that are not finite. No communication: the norm is the same on every rank.

    Raises:
        NonFiniteError: with names of parameters of this rank whose gradients are not finite.
    """
    if math.isfinite(grad_norm):
        return
    names = [
        name
        for model in models
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not torch.isfinite(parameter.main_grad).all()  # type: ignore[attr-defined]
    ]
    raise NonFiniteError(
        f"step {step}, rank {rank}: the gradient norm is {grad_norm} though every loss is finite; "
        f"not finite are the gradients of: {', '.join(names[:5]) or 'none on this rank'}. No optimizer step was taken."
    )
