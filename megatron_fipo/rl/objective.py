"""The policy loss: FIPO, and DAPO, GRPO, Dr. GRPO and RLOO as settings of the same function.

Shapes: T packed tokens, S sequences. On a context-parallel rank T is the number of local tokens, while everything of
length S describes whole sequences; what needs the other ranks is asked of `Sequences`.

    log_prob_shift -> participates -> suffix sum -> influence_weights -> clipped_token_loss -> rollout correction
    -> aggregation

Three policies have a part: behaviour wrote the tokens, each token under its own version of the weights; proximal is
the actor before the step's first update (`old_log_probs`); current is the one that is trained. Shift, Future-KL and
clip take current over proximal. What lies between behaviour and proximal is the rollout correction's alone: it weighs a
token's loss and never enters the suffix sum, so that with equal weights F is 0 however stale a token is.

Source: FIPO, arXiv 2603.19835, and its public code, which is followed where the two differ (safety clip, sequence
filter). Everything is float32 at least, whatever the model's dtype: in bfloat16 gamma itself would be another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig, check_objective
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.rl.former_call import takes_former_call
from megatron_fipo.rl.objective_metrics import policy_metrics
from megatron_fipo.rl.rollout_correction import Correction, correct
from megatron_fipo.rl.sequences import Sequences, count_per_sequence
from megatron_fipo.rl.shadow import shadow_metrics
from megatron_fipo.rl.token_values import TokenValues

MAX_LOG_PROB_SHIFT = 20.0
"""The shift is clamped to ± this before it is exponentiated."""
SAFETY_RANGE = (0.8, 1.0)
"""Range of a weight where the advantage is negative and the ratio above safety_ratio."""


@dataclass(frozen=True)
class LossOutput:
    """One microbatch's contribution to an update, with the values that it was computed from."""

    loss_sum: Tensor
    """0-d, differentiable. Divide by `normalizer` summed over all microbatches, data- and context-parallel ranks."""
    normalizer: Tensor
    """0-d int64: tokens (token_mean), sequences (sequence_mean) or sequences * sequence_sum_tokens (sequence_sum)."""
    metrics: Metrics
    """Metrics by name, with their reductions; see `objective_metrics`."""
    token_loss: Tensor
    """[T] what was aggregated over `final_mask`, KL penalty and entropy bonus included; detached."""
    influence_weights: Tensor
    """[T] f; 1 without Future-KL."""
    future_kl: Tensor | None
    """[T] F; None without Future-KL."""
    final_mask: Tensor
    """bool [T], response tokens that stayed in the loss, after the sequence filter and the rollout correction."""
    passes_filter: Tensor
    """bool [S], False where the sequence filter drops the response."""
    correction_weights: Tensor | None
    """[T] factor of each token's policy loss by the rollout correction; None where no rollout_log_probs came."""


@takes_former_call
def policy_loss(tokens: TokenValues, sequences: Sequences, config: FipoConfig) -> LossOutput:
    """The clipped policy loss of one microbatch, summed, with the count by which to divide it.

    No collective here; `sequences` may hold some. Differentiable in log_probs and entropy; Future-KL and all weights
    are detached. With every token masked, loss_sum is a 0 that still hangs on log_probs' graph, and normalizer is 0.

    Args:
        tokens: everything per token.
        sequences: what this rank knows of the whole sequences: `WholeSequences` where it holds them,
            `ShardedSequences` under context parallelism.
        config: the objective.

    Raises:
        ValueError: if the configuration contradicts itself, what it needs is missing, or a shape does not fit.
    """
    _check(tokens, sequences, config)
    tokens = tokens.raised()
    shift = log_prob_shift(tokens.log_probs, tokens.old_log_probs)
    correction = None if tokens.rollout_log_probs is None else correct(tokens, sequences, config)
    influence = _influence(shift.detach(), tokens, sequences, config)
    kept = influence.kept if correction is None else influence.kept & correction.accepted_sequences
    final_mask = tokens.response_mask & kept[sequences.ids]
    if correction is not None:
        final_mask = final_mask & correction.accepted_tokens

    kl = None
    if tokens.reference_log_probs is not None:
        kl = reference_kl(tokens.log_probs, tokens.reference_log_probs)
    token_loss = _token_loss(shift, influence.weights, correction, kl, tokens, config)
    loss_sum, normalizer = _aggregate(token_loss, final_mask, kept, correction, tokens, sequences, config)
    metrics = policy_metrics(
        shift=shift.detach(),
        advantages=tokens.advantages,
        weights=influence.weights,
        future_kl=influence.future_kl,
        response_mask=tokens.response_mask,
        num_filtered=(~influence.kept).sum() if config.future_kl and sequences.counts_here else None,
        loss=(loss_sum.detach(), normalizer),
        reference_kl=None if kl is None else kl.detach(),
        entropy=None if tokens.entropy is None else tokens.entropy.detach(),
        config=config,
    )
    if correction is not None:
        metrics |= correction.metrics
    if config.shadow:
        metrics |= shadow_metrics(
            lambda settings: future_kl_terms(shift.detach(), tokens, settings),
            lambda sums, settings: influence_weights(sums, shift.detach().exp(), tokens.advantages, settings),
            influence.weights,
            tokens.response_mask,
            sequences,
            config,
        )
    return LossOutput(
        loss_sum,
        normalizer,
        metrics,
        token_loss.detach(),
        influence.weights,
        influence.future_kl,
        final_mask,
        influence.kept,
        None if correction is None else correction.weights,
    )


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


@dataclass(frozen=True, eq=False)
class _Influence:
    """The result of Future-KL for one microbatch; all tensors are detached."""

    weights: Tensor
    """[T] f."""
    future_kl: Tensor | None
    """[T] F."""
    kept: Tensor
    """bool [S], False where the filter drops the sequence."""


def _influence(shift: Tensor, tokens: TokenValues, sequences: Sequences, config: FipoConfig) -> _Influence:
    """Future-KL, the weights by it, and the sequence filter, whose count travels with the suffix sum."""
    if not config.future_kl:
        kept = torch.ones(sequences.num, dtype=torch.bool, device=shift.device)
        return _Influence(torch.ones_like(shift), None, kept)
    ratio = shift.exp()
    summed, enters = future_kl_terms(shift, tokens, config)
    x = torch.where(enters, summed, 0.0)
    clipped = dual_clipped(ratio, tokens.advantages, tokens.response_mask, config)
    future_kl, num_clipped = sequences.suffix_sum(x, clipped, config.half_life_tokens)
    weights = influence_weights(future_kl, ratio, tokens.advantages, config)
    return _Influence(weights, future_kl, num_clipped <= config.max_dual_clipped_tokens)


def future_kl_terms(shift: Tensor, tokens: TokenValues, config: FipoConfig) -> tuple[Tensor, Tensor]:
    """([T] what the suffix sum may add up, bool [T] where it does); detached.

    It adds up the shifts of the response tokens that take part. The ablation future_kl_reference=behaviour sums up, and
    judges by `participates`, the shift against the policy that wrote the token. Everything else that a shift decides
    stays with the proximal policy.

    Args:
        shift: [T] from `log_prob_shift`, detached.
    """
    if config.future_kl_reference == "behaviour":
        assert tokens.rollout_log_probs is not None, "_check demands them"
        shift = log_prob_shift(tokens.log_probs, tokens.rollout_log_probs).detach()
    return shift, tokens.response_mask & participates(shift.exp(), config)


def _token_loss(
    shift: Tensor,
    weights: Tensor,
    correction: Correction | None,
    kl: Tensor | None,
    tokens: TokenValues,
    config: FipoConfig,
) -> Tensor:
    """[T] the clipped loss, corrected for the rollout engine, with KL penalty and entropy bonus. Differentiable."""
    loss = clipped_token_loss(shift, weights * tokens.advantages, config)
    if correction is not None:
        loss = loss * correction.weights
    if kl is not None and config.kl_coefficient:
        loss = loss + config.kl_coefficient * kl
    if tokens.entropy is not None and config.entropy_coefficient:
        loss = loss - config.entropy_coefficient * tokens.entropy.to(loss.dtype)
    return loss


def _aggregate(
    token_loss: Tensor,
    final_mask: Tensor,
    kept: Tensor,
    correction: Correction | None,
    tokens: TokenValues,
    sequences: Sequences,
    config: FipoConfig,
) -> tuple[Tensor, Tensor]:
    """(loss_sum, normalizer), see `LossOutput`. Sequences without response tokens count nowhere."""
    masked = torch.where(final_mask, token_loss, 0.0)
    if config.loss_aggregation == "token_mean":
        return masked.sum(), final_mask.sum()
    lengths = _response_lengths(correction, tokens, sequences, config)
    num_sequences = (kept & (lengths > 0)).sum() * int(sequences.counts_here)
    if config.loss_aggregation == "sequence_mean":
        return (masked / lengths.clamp(min=1)[sequences.ids]).sum(), num_sequences
    assert config.sequence_sum_tokens is not None
    return masked.sum(), num_sequences * config.sequence_sum_tokens


def _response_lengths(
    correction: Correction | None, tokens: TokenValues, sequences: Sequences, config: FipoConfig
) -> Tensor:
    """int64 [S]: response tokens of each whole sequence, without those that a correction by tokens masked."""
    mask = tokens.response_mask
    if correction is not None and config.rollout_correction == "token_masked":
        mask = mask & correction.accepted_tokens
    elif sequences.response_tokens is not None:
        return sequences.response_tokens
    return sequences.total(count_per_sequence(mask, sequences.ids, sequences.num))


def _check(tokens: TokenValues, sequences: Sequences, config: FipoConfig) -> None:
    """Raise unless tokens, sequences and configuration go together."""
    if not isinstance(tokens, TokenValues):
        raise TypeError(f"policy_loss takes TokenValues, not {type(tokens).__name__}, as its first argument.")
    if isinstance(sequences, Tensor):
        raise TypeError(
            "policy_loss takes Sequences, not a tensor, as its second argument: WholeSequences(cu_seqlens, "
            "log_probs.device), or ShardedSequences on a context-parallel rank."
        )
    _check_config(config)
    if sequences.ids.shape != tokens.log_probs.shape:
        raise ValueError(
            f"the sequences have {len(sequences.ids)} tokens on this rank but log_probs {len(tokens.log_probs)}. Make "
            "them of the layout in which the tokens lie, padding included."
        )
    if sequences.ids.device != tokens.log_probs.device:
        raise ValueError(
            f"the sequences were made for {sequences.ids.device} but log_probs lie on {tokens.log_probs.device}. Make "
            "them with device=log_probs.device."
        )
    sums_behaviour = (config.future_kl or config.shadow) and config.future_kl_reference == "behaviour"
    for key, value, name in (
        ("future_kl_reference", sums_behaviour and config.future_kl_reference, "rollout_log_probs"),
        ("kl_coefficient", config.kl_coefficient, "reference_log_probs"),
        ("entropy_coefficient", config.entropy_coefficient, "entropy"),
        ("rollout_correction", config.rollout_correction != "none" and config.rollout_correction, "rollout_log_probs"),
    ):
        if value and getattr(tokens, name) is None:
            raise ValueError(f"objective.{key}={value} needs {name}; none came with the tokens.")


@lru_cache(maxsize=16)
def _check_config(config: FipoConfig) -> None:
    """Raise ValueError where a run would refuse the objective. A good one is not looked at again."""
    check_objective(config)
