"""The objective for trainers that hold responses padded, as TRL and verl do: [B, L] in place of packed tokens.

Each row is laid out as one sequence of L tokens, and `policy_loss` does the rest. What lies where the mask is 0 is
never read: it may be anything, NaN included, and gets a gradient of 0.

Shapes: B responses, L the longest, padding anywhere.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.rl.future_kl import future_kl
from megatron_fipo.rl.objective import LossOutput, policy_loss
from megatron_fipo.rl.sequences import WholeSequences
from megatron_fipo.rl.token_values import TokenValues


def padded_policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: FipoConfig,
    *,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
) -> LossOutput:
    """`policy_loss` of padded responses. No collective; differentiable in `log_probs` and `entropy`.

    The loss of one process and one microbatch is `output.loss_sum / output.normalizer.clamp(min=1)`. With several,
    divide by the sum of their normalizers.

    Args:
        log_probs: [B, L] of the policy that is trained.
        old_log_probs: [B, L] of the policy at the start of the step; never the detached `log_probs` of this update,
            whose shifts are all 0, so that Future-KL has nothing to tell.
        advantages: one a response ([B] or [B, 1]), or [B, L], constant within a response.
        response_mask: [B, L], true or 1 for tokens that the policy wrote and that may carry loss, else false or 0.
        config: the objective.
        reference_log_probs: [B, L] of the frozen reference policy; needed if kl_coefficient is not 0.
        entropy: [B, L] of the policy; needed if entropy_coefficient is not 0, otherwise only logged.
        rollout_log_probs: [B, L] by the rollout engine; needed for a rollout_correction and for
            future_kl_reference=behaviour, otherwise only logged.

    Returns:
        What `policy_loss` returns, with everything per token as [B, L]. Where the mask is 0, future_kl holds what
        follows on real tokens, and the others mean nothing.

    Raises:
        ValueError: if a shape does not fit, the mask holds anything but 0 and 1, or an argument that the
            configuration needs is missing.
    """
    mask = _checked_mask(log_probs, response_mask)
    shape = log_probs.shape
    if advantages.shape == shape[:1]:
        advantages = advantages[:, None]
    if advantages.shape == (shape[0], 1):
        advantages = advantages.expand(shape)
    tokens = TokenValues(
        _real_tokens("log_probs", log_probs, mask),
        _real_tokens("old_log_probs", old_log_probs, mask),
        _real_tokens("advantages", advantages, mask),
        mask.flatten(),
        _optional("reference_log_probs", reference_log_probs, mask),
        _optional("entropy", entropy, mask),
        _optional("rollout_log_probs", rollout_log_probs, mask),
    )
    output = policy_loss(tokens, WholeSequences(_rows(shape), log_probs.device), config)
    return replace(
        output,
        token_loss=output.token_loss.view(shape),
        influence_weights=output.influence_weights.view(shape),
        future_kl=None if output.future_kl is None else output.future_kl.view(shape),
        final_mask=output.final_mask.view(shape),
        correction_weights=None if output.correction_weights is None else output.correction_weights.view(shape),
    )


def padded_future_kl(shift: Tensor, response_mask: Tensor, half_life_tokens: float) -> Tensor:
    """F [B, L] float32: `future_kl` of each row, tokens whose mask is 0 adding nothing and still counting as distance.

    Args:
        shift: [B, L] float32, log-prob shifts of the tokens, 0 where a token is not to take part.
        response_mask: [B, L], true or 1 for tokens that the policy wrote, else false or 0.
        half_life_tokens: distance in tokens at which influence has halved, > 0.

    Raises:
        ValueError: if a shape or dtype does not fit, or the half-life is not positive.
    """
    mask = _checked_mask(shift, response_mask)
    return future_kl(_real_tokens("shift", shift, mask), _rows(shift.shape), half_life_tokens).view(shift.shape)


def _checked_mask(values: Tensor, response_mask: Tensor) -> Tensor:
    """The mask as bool [B, L]."""
    if values.dim() != 2:
        raise ValueError(f"padded responses are [B, L]; these have the shape {tuple(values.shape)}.")
    if response_mask.shape != values.shape:
        raise ValueError(
            f"response_mask has the shape {tuple(response_mask.shape)} but the log-probs have {tuple(values.shape)}. "
            "Pass the mask of the response's tokens alone, without the prompt's."
        )
    mask = response_mask.bool()
    if response_mask.dtype != torch.bool and not torch.equal(mask.to(response_mask.dtype), response_mask):
        raise ValueError("response_mask holds values other than 0 and 1. Weigh tokens by their advantages instead.")
    return mask


def _real_tokens(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """[B * L] the values, 0 in the padding, so that neither they nor their gradients can be NaN there."""
    if values.shape != mask.shape:
        raise ValueError(f"{name} has the shape {tuple(values.shape)} but the mask has {tuple(mask.shape)}.")
    return torch.where(mask, values, 0.0).flatten()


def _optional(name: str, values: Tensor | None, mask: Tensor) -> Tensor | None:
    return None if values is None else _real_tokens(name, values, mask)


def _rows(shape: torch.Size) -> Tensor:
    """[B + 1] on the CPU, cumulative lengths of B sequences of L tokens each."""
    return torch.arange(shape[0] + 1) * shape[1]
