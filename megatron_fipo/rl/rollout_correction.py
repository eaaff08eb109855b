"""How far the rollout engine's policy lies from the actor's, and corrections of the loss for it.

The engine samples from mu, which has the actor's weights but other kernels, precision or batching; the actor's pi_old
scores the same tokens differently. The gap makes every update off-policy before the first one is taken.

Shapes: T packed tokens (local ones on a context-parallel rank), S whole sequences. With

    d_t = log pi_old(y_t) - log mu(y_t),    rho_t = exp(d_t),    rho(y) = exp(sum of d_t over the response),

objective.rollout_correction multiplies each token's policy loss by a constant weight w_t, or leaves tokens out:

| value            | w_t              | leaves the loss                              | source              |
|------------------|------------------|----------------------------------------------|---------------------|
| token_truncated  | min(rho_t, high) | nothing                                      | TIS, Yao et al.     |
| token_masked     | rho_t            | tokens with rho_t outside [low, high]        | MIS, IcePop         |
| sequence_masked  | rho(y)           | responses with rho(y) outside [low, high]    | MIS, Liu, Li et al. |
| geometric_masked | 1                | responses with rho(y)^(1/L) outside the same | the same, part 3    |

low and high are objective.rollout_ratio_min and rollout_ratio_max. What leaves the loss leaves its denominator too, as
the sequence filter's responses do; IcePop as published keeps masked tokens in the denominator. Future-KL is not
touched: it compares two policies of the actor. The KL penalty and the entropy bonus are not weighted.

rho(y) is a product over the response: at 10,000 tokens a bias of 1e-4 a token is a factor of e. For long responses
take geometric_masked, whose band lies close to 1 (0.999 to 1.001).

Sources: F. Yao et al., "Your efficient RL framework secretly brings you off-policy RL training", 2025
(fengyao.notion.site/off-policy-rl), truncation at 2. J. Liu, Y. Li et al., "When speed kills stability: demystifying RL
collapse from the training-inference mismatch", 2025 (richardli.xyz/rl-collapse). IcePop: "Every step evolves", Ring-1T,
arXiv 2510.18855, with [0.5, 5]. The weight on a clipped loss: J. Hilton et al., "Batch size-invariance for policy
optimization", arXiv 2110.00641.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig, choices_of
from megatron_fipo.metrics.reductions import Mean, Metrics
from megatron_fipo.rl.objective_metrics import masked_max, masked_mean, masked_share, masked_std

CORRECTIONS = choices_of(FipoConfig, "rollout_correction")
"""What objective.rollout_correction may be."""
MAX_DIFFERENCE = 20.0
"""A token's log-prob difference is clamped to ± this before it is exponentiated or summed up."""
BANDS = ((0.99, 1.01), (0.8, 1.25), (0.5, 2.0))
"""Ranges of the ratio pi_old / mu whose outside share is logged."""

SumOverShards = Callable[[Tensor], Tensor]
"""Adds sums over this rank's rows, [S, …], up to sums over whole sequences, the same on every rank that shares them."""


@dataclass(frozen=True)
class Correction:
    """What a correction makes of a microbatch's loss; detached."""

    weights: Tensor
    """[T] factor of each token's policy loss."""
    accepted_tokens: Tensor
    """bool [T], False where a token leaves the loss."""
    accepted_sequences: Tensor
    """bool [S], False where a whole response leaves the loss."""
    metrics: Metrics
    """mismatch/…"""


def log_prob_difference(old_log_probs: Tensor, rollout_log_probs: Tensor) -> Tensor:
    """d [T] = log pi_old(y) - log mu(y), clamped to ± MAX_DIFFERENCE; detached."""
    return (old_log_probs - rollout_log_probs).detach().clamp(-MAX_DIFFERENCE, MAX_DIFFERENCE)


def correct(
    old_log_probs: Tensor,
    rollout_log_probs: Tensor,
    response_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    config: FipoConfig,
    sum_over_shards: SumOverShards | None = None,
    *,
    counts_sequences: bool = True,
) -> Correction:
    """The mismatch of a microbatch and, by objective.rollout_correction, what is done about it.

    No collective here; `sum_over_shards` may hold one, and is called for corrections by whole sequences alone.

    Args:
        old_log_probs: [T] by the actor, before the step's first update.
        rollout_log_probs: [T] by the rollout engine, at its temperature.
        response_mask: bool [T].
        sequence_ids: int64 [T], the sequence of each token.
        num_sequences: S.
        sum_over_shards: None where this process holds whole sequences.
        counts_sequences: whether this rank counts sequences in the metrics: on exactly one context-parallel rank.
    """
    difference = log_prob_difference(old_log_probs, rollout_log_probs)
    metrics = mismatch_metrics(difference, rollout_log_probs, response_mask)
    weights = torch.ones_like(difference)
    tokens = torch.ones_like(response_mask)
    sequences = torch.ones(num_sequences, dtype=torch.bool, device=difference.device)
    kind, low, high = config.rollout_correction, config.rollout_ratio_min, config.rollout_ratio_max
    if kind == "none":
        return Correction(weights, tokens, sequences, metrics)
    count = response_mask.sum()
    if kind == "token_truncated":
        weights = difference.exp().clamp(max=high)
        metrics["mismatch/truncated_share"] = masked_share(difference > math.log(high), response_mask, count)
    elif kind == "token_masked":
        tokens = _inside(difference, low, high)
        weights = torch.where(tokens, difference, 0.0).exp()
    else:
        log_ratio, lengths = _sequence_sums(difference, response_mask, sequence_ids, num_sequences, sum_over_shards)
        if kind == "geometric_masked":
            sequences = _inside(log_ratio / lengths.clamp(min=1), low, high)
        else:
            sequences = _inside(log_ratio, low, high)
            weights = torch.where(sequences, log_ratio, 0.0).exp().to(difference.dtype)[sequence_ids]
        if counts_sequences:
            has_response = lengths > 0
            metrics["mismatch/masked_sequences_share"] = Mean((has_response & ~sequences).sum(), has_response.sum())
    accepted = tokens & sequences[sequence_ids]
    if kind != "token_truncated":
        metrics["mismatch/masked_share"] = masked_share(~accepted, response_mask, count)
    inside = response_mask & accepted
    metrics["mismatch/weight/mean"] = masked_mean(weights, inside, inside.sum())
    metrics["mismatch/weight/max"] = masked_max(weights, inside)
    return Correction(weights, tokens, sequences, metrics)


def _sequence_sums(
    difference: Tensor,
    response_mask: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    sum_over_shards: SumOverShards | None,
) -> tuple[Tensor, Tensor]:
    """(log rho(y), response tokens), float64 [S] each, of whole sequences."""
    per_token = torch.stack([difference.double(), torch.ones_like(difference, dtype=torch.float64)], dim=1)
    sums = per_token.new_zeros(num_sequences, 2)
    sums.index_add_(0, sequence_ids, torch.where(response_mask[:, None], per_token, 0.0))
    if sum_over_shards is not None:
        sums = sum_over_shards(sums)
    log_ratio, lengths = sums.unbind(1)
    return log_ratio, lengths


def mismatch_metrics(difference: Tensor, rollout_log_probs: Tensor, response_mask: Tensor) -> Metrics:
    """What the gap looks like over the response tokens of one microbatch.

    The tokens were sampled from mu, so that both estimates are of KL(mu || pi_old): kl_k1 is the mean of -d, unbiased
    and of either sign; kl (k3) the mean of exp(d) - 1 - d, unbiased too, never negative and of less variance.
    Source: J. Schulman, "Approximating KL divergence", 2020.

    Args:
        difference: [T], from `log_prob_difference`.
    """
    count = response_mask.sum()
    ratio = difference.exp()
    probability_difference = (ratio - 1) * rollout_log_probs.detach().exp()
    metrics: Metrics = {
        "mismatch/log_prob_difference/mean": masked_mean(difference, response_mask, count),
        "mismatch/log_prob_difference/std": masked_std(difference, response_mask, count),
        "mismatch/log_prob_difference/absmean": masked_mean(difference.abs(), response_mask, count),
        "mismatch/log_prob_difference/absmax": masked_max(difference.abs(), response_mask),
        "mismatch/probability_difference/absmax": masked_max(probability_difference.abs(), response_mask),
        "mismatch/kl_k1/mean": masked_mean(-difference, response_mask, count),
        "mismatch/kl/mean": masked_mean(torch.expm1(difference.double()) - difference, response_mask, count),
    }
    for low, high in BANDS:
        outside = ~_inside(difference, low, high)
        metrics[f"mismatch/share_outside_{low:g}_to_{high:g}"] = masked_share(outside, response_mask, count)
    return metrics


def _inside(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """bool: whether low <= exp(log_ratio) <= high. NaN counts as inside: masked, it would never stop the run."""
    return ~((log_ratio < math.log(low)) | (log_ratio > math.log(high)))
