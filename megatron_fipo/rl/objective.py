"""The policy loss: FIPO, and DAPO, GRPO, Dr. GRPO and RLOO as settings of the same function.

Shapes: T packed tokens, S sequences. On a context-parallel rank T is the number of local tokens, while `cu_seqlens`
and everything of length S describe whole sequences; what needs the other ranks is injected: `suffix_sum` and, for
corrections of the rollout mismatch, `sum_over_shards`.

    log_prob_shift -> participates -> suffix sum -> influence_weights -> clipped_token_loss -> rollout correction
    -> aggregation

Source: FIPO, arXiv 2603.19835, and its public code, which is followed where the two differ (safety clip, sequence
filter). Everything is float32 at least, whatever the model's dtype: in bfloat16 gamma itself would be another one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.rl.future_kl import future_kl as packed_future_kl
from megatron_fipo.rl.objective_metrics import policy_metrics
from megatron_fipo.rl.rollout_correction import CORRECTIONS, Correction, SumOverShards, correct

MAX_LOG_PROB_SHIFT = 20.0
"""The shift is clamped to ± this before it is exponentiated."""
SAFETY_RANGE = (0.8, 1.0)
"""Range of a weight where the advantage is negative and the ratio above safety_ratio."""

SuffixSum = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""suffix_sum(x [T], dual_clipped [T] bool, cu_seqlens [S + 1]) -> (future_kl [T], dual-clipped tokens [S] int64), both
over whole sequences, wherever their tokens lie."""


@dataclass(frozen=True)
class LossOutput:
    """What one microbatch adds to an update, and what it was made of."""

    loss_sum: Tensor
    """0-d, differentiable. Divide by `normalizer` summed over all microbatches, data- and context-parallel ranks."""
    normalizer: Tensor
    """0-d int64: tokens (token_mean), sequences (sequence_mean) or sequences * sequence_sum_tokens (sequence_sum)."""
    metrics: Metrics
    """By name, with their reductions; see `objective_metrics`."""
    token_loss: Tensor
    """[T] what was aggregated over `final_mask`, KL penalty and entropy bonus included; detached."""
    influence_weights: Tensor
    """[T] f; 1 without Future-KL."""
    future_kl: Tensor | None
    """[T] F; None without Future-KL."""
    final_mask: Tensor
    """bool [T], response tokens that stayed in the loss, after the sequence filter and the rollout correction."""


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    cu_seqlens: Tensor,
    config: FipoConfig,
    suffix_sum: SuffixSum | None = None,
    *,
    sequence_ids: Tensor | None = None,
    response_token_counts: Tensor | None = None,
    counts_sequences: bool = True,
    reference_log_probs: Tensor | None = None,
    entropy: Tensor | None = None,
    rollout_log_probs: Tensor | None = None,
    sum_over_shards: SumOverShards | None = None,
) -> LossOutput:
    """The clipped policy loss of one microbatch, summed, with the count that it is to be divided by.

    No collective here; `suffix_sum` and `sum_over_shards` may hold some. Differentiable in `log_probs` and `entropy`;
    Future-KL and all weights are detached. With every token masked, loss_sum is a 0 that still hangs on log_probs'
    graph, and normalizer is 0.

    Args:
        log_probs: [T] of the policy that is trained.
        old_log_probs: [T] of the policy at the start of the step.
        advantages: [T], constant within a response.
        response_mask: bool [T], tokens that the policy wrote and that may carry loss.
        cu_seqlens: [S + 1] cumulative lengths of the whole sequences as they are laid out, padding included.
        config: the objective.
        suffix_sum: Future-KL over whole sequences; None where this process holds them (`local_suffix_sum`).
        sequence_ids: int64 [T], the sequence of each token; None where this process holds whole sequences.
        response_token_counts: int64 [S], response tokens of each whole sequence, needed for sequence_mean and
            sequence_sum where this process does not hold them; None counts response_mask.
        counts_sequences: whether this rank adds the sequences to the normalizer: on exactly one context-parallel rank.
        reference_log_probs: [T] of the frozen reference policy; needed if kl_coefficient is not 0.
        entropy: [T] of the policy; needed if entropy_coefficient is not 0, otherwise only logged.
        rollout_log_probs: [T] by the rollout engine; needed for a rollout_correction, otherwise only logged.
        sum_over_shards: adds sums of length S over context-parallel ranks; None where this process holds whole
            sequences.

    Raises:
        ValueError: if a shape, or an argument that the configuration needs, is missing or does not fit.
    """
    _check_tokens(
        log_probs,
        old_log_probs=old_log_probs,
        advantages=advantages,
        response_mask=response_mask,
        sequence_ids=sequence_ids,
        reference_log_probs=reference_log_probs,
        entropy=entropy,
        rollout_log_probs=rollout_log_probs,
    )
    _check_config(config, reference_log_probs, entropy, rollout_log_probs)
    if config.loss_aggregation != "token_mean" and sequence_ids is not None and response_token_counts is None:
        raise ValueError(
            f"objective.loss_aggregation={config.loss_aggregation} with sequence_ids needs response_token_counts: "
            "this process may hold only parts of the sequences."
        )
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    log_probs, advantages = log_probs.to(dtype), advantages.to(dtype)
    num_sequences = cu_seqlens.shape[0] - 1
    if sequence_ids is None:
        sequence_ids = sequence_ids_of(cu_seqlens, log_probs.shape[0], log_probs.device)

    shift = log_prob_shift(log_probs, old_log_probs.to(dtype))
    correction = None
    if rollout_log_probs is not None:
        correction = correct(
            old_log_probs.to(dtype),
            rollout_log_probs.to(dtype),
            response_mask,
            sequence_ids,
            num_sequences,
            config,
            sum_over_shards,
            counts_sequences=counts_sequences,
        )
    future_kl, kept = None, torch.ones(num_sequences, dtype=torch.bool, device=log_probs.device)
    weights = torch.ones_like(shift)
    if config.future_kl:
        ratio = shift.detach().exp()
        x = torch.where(response_mask & participates(ratio, config), shift.detach(), 0.0)
        clipped = dual_clipped(ratio, advantages, response_mask, config)
        suffix_sum = suffix_sum or local_suffix_sum(config.half_life_tokens)
        future_kl, num_clipped = suffix_sum(x, clipped, cu_seqlens)
        weights = influence_weights(future_kl, ratio, advantages, config)
        kept = num_clipped <= config.max_dual_clipped_tokens
    num_filtered = (~kept).sum()
    final_mask = response_mask & kept[sequence_ids]

    token_loss = clipped_token_loss(shift, weights * advantages, config)
    if correction is not None:
        token_loss = token_loss * correction.weights
        kept = kept & correction.accepted_sequences
        final_mask = final_mask & kept[sequence_ids] & correction.accepted_tokens
    kl = None if reference_log_probs is None else reference_kl(log_probs, reference_log_probs.to(dtype))
    if kl is not None and config.kl_coefficient:
        token_loss = token_loss + config.kl_coefficient * kl
    if entropy is not None and config.entropy_coefficient:
        token_loss = token_loss - config.entropy_coefficient * entropy.to(dtype)

    if config.loss_aggregation != "token_mean":
        response_token_counts = _token_counts(
            response_token_counts, response_mask, sequence_ids, num_sequences, config, correction, sum_over_shards
        )
    loss_sum, normalizer = _aggregate(
        token_loss, final_mask, sequence_ids, kept, response_token_counts, counts_sequences, config
    )
    metrics = policy_metrics(
        shift=shift.detach(),
        advantages=advantages,
        weights=weights,
        future_kl=future_kl,
        response_mask=response_mask,
        num_filtered=num_filtered if config.future_kl and counts_sequences else None,
        loss=(loss_sum.detach(), normalizer),
        reference_kl=None if kl is None else kl.detach(),
        entropy=None if entropy is None else entropy.detach(),
        config=config,
    )
    if correction is not None:
        metrics |= correction.metrics
    return LossOutput(loss_sum, normalizer, metrics, token_loss.detach(), weights, future_kl, final_mask)


def log_prob_shift(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """s = log pi(y) - log pi_old(y), clamped to ± MAX_LOG_PROB_SHIFT; differentiable inside the clamp."""
    return (log_probs - old_log_probs.detach()).clamp(-MAX_LOG_PROB_SHIFT, MAX_LOG_PROB_SHIFT)


def participates(ratio: Tensor, config: FipoConfig) -> Tensor:
    """bool [T]: whether a token's shift enters Future-KL; a ratio above dual_clip forbids it, but for an ablation."""
    if not config.filter_extreme_ratios:
        return torch.ones_like(ratio, dtype=torch.bool)
    assert config.dual_clip is not None
    return ratio <= config.dual_clip


def dual_clipped(ratio: Tensor, advantages: Tensor, response_mask: Tensor, config: FipoConfig) -> Tensor:
    """bool [T]: response tokens of negative advantage and a ratio above dual_clip; the sequence filter counts them."""
    assert config.dual_clip is not None
    return response_mask & (advantages < 0) & (ratio > config.dual_clip)


def influence_weights(future_kl: Tensor, ratio: Tensor, advantages: Tensor, config: FipoConfig) -> Tensor:
    """f [T]: exp(F) within [influence_min, influence_max], then within SAFETY_RANGE where A < 0 and r > safety_ratio.

    The paper says that those tokens' weights are reset to 1; its code clips them, and so does this.
    """
    weights = future_kl.exp().clamp(config.influence_min, config.influence_max)
    unsafe = (advantages < 0) & (ratio > config.safety_ratio)
    return torch.where(unsafe, weights.clamp(*SAFETY_RANGE), weights)


def clipped_token_loss(shift: Tensor, weighted_advantages: Tensor, config: FipoConfig) -> Tensor:
    """[T] max(-w r, -w clip(r)), where w < 0 at most -w * dual_clip; w = f * A, r = exp(shift). Differentiable in s."""
    ratio = shift.exp()
    clipped_ratio = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    loss = torch.maximum(-weighted_advantages * ratio, -weighted_advantages * clipped_ratio)
    if config.dual_clip is None:
        return loss
    bounded = torch.minimum(loss, -weighted_advantages * config.dual_clip)
    return torch.where(weighted_advantages < 0, bounded, loss)


def reference_kl(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """[T] the k3 estimate of KL(policy || reference): exp(d) - d - 1 >= 0 with d = log reference - log policy.

    d is clamped like the shift. Differentiable in log_probs. Source: J. Schulman, "Approximating KL divergence", 2020.
    """
    difference = -log_prob_shift(log_probs, reference_log_probs)
    return difference.exp() - difference - 1


def local_suffix_sum(half_life_tokens: float) -> SuffixSum:
    """The suffix sum for a process that holds whole sequences."""

    def suffix_sum(x: Tensor, clipped: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        values = packed_future_kl(x, cu_seqlens, half_life_tokens)
        ids = sequence_ids_of(cu_seqlens, x.shape[0], x.device)
        return values, count_per_sequence(clipped, ids, cu_seqlens.shape[0] - 1)

    return suffix_sum


def sequence_ids_of(cu_seqlens: Tensor, num_tokens: int, device: torch.device) -> Tensor:
    """int64 [T]: the sequence to which each of `num_tokens` tokens belongs.

    Raises:
        ValueError: if the sequences have another number of tokens in all, as on a context-parallel rank.
    """
    lengths = cu_seqlens.diff().to(device=device, dtype=torch.int64)
    if int(cu_seqlens[-1]) != num_tokens:
        raise ValueError(
            f"cu_seqlens ends at {int(cu_seqlens[-1])} but there are {num_tokens} tokens. Under context parallelism "
            "pass sequence_ids, suffix_sum and response_token_counts."
        )
    ids = torch.arange(lengths.shape[0], device=device)
    return torch.repeat_interleave(ids, lengths, output_size=num_tokens)


def _aggregate(
    token_loss: Tensor,
    final_mask: Tensor,
    sequence_ids: Tensor,
    kept: Tensor,
    response_token_counts: Tensor | None,
    counts_sequences: bool,
    config: FipoConfig,
) -> tuple[Tensor, Tensor]:
    """(loss_sum, normalizer), see `LossOutput`. Sequences without response tokens count nowhere."""
    masked = torch.where(final_mask, token_loss, 0.0)
    if config.loss_aggregation == "token_mean":
        return masked.sum(), final_mask.sum()
    assert response_token_counts is not None
    num_sequences = (kept & (response_token_counts > 0)).sum() * int(counts_sequences)
    if config.loss_aggregation == "sequence_mean":
        return (masked / response_token_counts.clamp(min=1)[sequence_ids]).sum(), num_sequences
    assert config.sequence_sum_tokens is not None
    return masked.sum(), num_sequences * config.sequence_sum_tokens


def _token_counts(
    response_token_counts: Tensor | None,
    response_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    config: FipoConfig,
    correction: Correction | None,
    sum_over_shards: SumOverShards | None,
) -> Tensor:
    """int64 [S]: response tokens of each whole sequence, without those that a correction by tokens masked."""
    if correction is not None and config.rollout_correction == "token_masked":
        accepted = count_per_sequence(response_mask & correction.accepted_tokens, sequence_ids, num_sequences)
        return accepted if sum_over_shards is None else sum_over_shards(accepted)
    if response_token_counts is None:
        return count_per_sequence(response_mask, sequence_ids, num_sequences)
    return response_token_counts


def count_per_sequence(mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Tensor:
    """int64 [S]: True entries of mask [T] in each sequence."""
    counts = torch.zeros(num_sequences, dtype=torch.int64, device=mask.device)
    return counts.index_add_(0, sequence_ids, mask.to(torch.int64))


def _check_tokens(log_probs: Tensor, **per_token: Tensor | None) -> None:
    """Raise ValueError unless everything per token fits log_probs."""
    if log_probs.dim() != 1 or not log_probs.shape[0]:
        raise ValueError(f"log_probs must be a vector of at least one token; its shape is {tuple(log_probs.shape)}.")
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != log_probs.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} but log_probs {tuple(log_probs.shape)}: one entry per token."
            )
    mask = per_token["response_mask"]
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"response_mask must be bool; it is {mask.dtype}.")


def _check_config(
    config: FipoConfig,
    reference_log_probs: Tensor | None,
    entropy: Tensor | None,
    rollout_log_probs: Tensor | None,
) -> None:
    """Raise ValueError where the configuration contradicts itself or needs an argument that is missing."""
    if config.future_kl and config.dual_clip is None:
        raise ValueError("objective.future_kl=true needs objective.dual_clip: ratios above it stay out of Future-KL.")
    if config.kl_coefficient and reference_log_probs is None:
        raise ValueError(
            f"objective.kl_coefficient={config.kl_coefficient} needs reference_log_probs; none were given."
        )
    if config.entropy_coefficient and entropy is None:
        raise ValueError(f"objective.entropy_coefficient={config.entropy_coefficient} needs entropy; none was given.")
    if config.rollout_correction not in CORRECTIONS:
        raise ValueError(
            f"objective.rollout_correction={config.rollout_correction} is unknown; choose {', '.join(CORRECTIONS)}."
        )
    if config.rollout_correction != "none" and rollout_log_probs is None:
        raise ValueError(
            f"objective.rollout_correction={config.rollout_correction} needs rollout_log_probs; none were given."
        )
    if config.loss_aggregation not in ("token_mean", "sequence_mean", "sequence_sum"):
        raise ValueError(
            f"objective.loss_aggregation={config.loss_aggregation} is unknown; choose token_mean, sequence_mean or "
            "sequence_sum."
        )
    if config.loss_aggregation == "sequence_sum" and not config.sequence_sum_tokens:
        raise ValueError(
            "objective.loss_aggregation=sequence_sum needs objective.sequence_sum_tokens, a positive length."
        )
