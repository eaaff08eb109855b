"""Log-probs that a step's updates compare with: the old policy's and, where there is a KL penalty, the reference's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import FipoConfig
from megatron_fipo.parallel.token_values import set_old_log_probs
from megatron_fipo.rl.packed_batch import PackedBatch


def fill_in_log_probs(
    minibatches: Sequence[Sequence[PackedBatch]],
    actor: Actor,
    objective: FipoConfig,
    recorded: Mapping[int, tuple[Tensor, Tensor]] | None,
) -> None:
    """Set `old_log_probs` and `reference_log_probs` of a step's microbatches. Collective over all ranks.

    Args:
        recorded: the old policy's log-probs, where a checkpoint holds them because the weights that gave them are gone.
    """
    if recorded is not None:
        set_old_log_probs(minibatches, recorded)
    elif objective.old_log_probs == "rollout":
        for batch in (batch for microbatches in minibatches for batch in microbatches):
            batch.old_log_probs = batch.rollout_log_probs
    else:  # nothing comes back where the pipeline does not end, and nothing is needed there
        for microbatches in minibatches:
            for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=False):
                batch.old_log_probs = log_probs
    if objective.kl_coefficient:
        for microbatches in minibatches:
            reference = actor.log_probs(microbatches, reference=True)
            for batch, log_probs in zip(microbatches, reference, strict=False):
                batch.reference_log_probs = log_probs
