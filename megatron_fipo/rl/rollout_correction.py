"""How far the rollout engine's policy lies from the actor's, and corrections of the loss for it.

The engine samples from mu, the behaviour policy. It has other kernels, precision or batching than the actor, and where
rollouts are older than the step that trains on them, older weights: each token those of its own version. pi_old, the
proximal policy, is the actor at the start of the step. The gap makes every update off-policy before the first one is
taken.

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
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.metrics.reductions import Mean, Metrics
from megatron_fipo.rl.objective_metrics import masked_max, masked_mean, masked_share, masked_std
from megatron_fipo.rl.sequences import Sequences
from megatron_fipo.rl.token_values import TokenValues

MAX_DIFFERENCE = 20.0
"""A token's log-prob difference is clamped to ± this before it is exponentiated or summed up."""
BANDS = ((0.99, 1.01), (0.8, 1.25), (0.5, 2.0))
"""Ranges of the ratio pi_old / mu whose outside share is logged."""


@dataclass(frozen=True)
class Correction:
    """The result of a correction for one microbatch; all tensors are detached."""

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


def correct(tokens: TokenValues, sequences: Sequences, config: FipoConfig) -> Correction:
    """The mismatch of a microbatch and, by objective.rollout_correction, what is done about it.

    No collective here; `sequences.total` may hold one, and is called for corrections by whole sequences alone.

    Args:
        tokens: with rollout_log_probs, all log-probs in one dtype.
    """
    assert tokens.rollout_log_probs is not None
    mask, ids = tokens.response_mask, sequences.ids
    difference = log_prob_difference(tokens.old_log_probs, tokens.rollout_log_probs)
    metrics = mismatch_metrics(difference, tokens.rollout_log_probs, mask)
    if tokens.staleness_steps is not None:
        metrics |= metrics_by_version(difference, tokens.staleness_steps, mask)
    weights, accepted_tokens = torch.ones_like(difference), torch.ones_like(mask)
    accepted_sequences = torch.ones(sequences.num, dtype=torch.bool, device=difference.device)
    kind, low, high = config.rollout_correction, config.rollout_ratio_min, config.rollout_ratio_max
    if kind == "none":
        return Correction(weights, accepted_tokens, accepted_sequences, metrics)
    count = mask.sum()
    if kind == "token_truncated":
        weights = difference.exp().clamp(max=high)
        metrics["mismatch/truncated_share"] = masked_share(difference > math.log(high), mask, count)
    elif kind == "token_masked":
        accepted_tokens = _inside(difference, low, high)
        weights = torch.where(accepted_tokens, difference, 0.0).exp()
    else:
        log_ratio, lengths = _sequence_sums(difference, mask, sequences)
        if kind == "geometric_masked":
            accepted_sequences = _inside(log_ratio / lengths.clamp(min=1), low, high)
        else:
            accepted_sequences = _inside(log_ratio, low, high)
            weights = torch.where(accepted_sequences, log_ratio, 0.0).exp().to(difference.dtype)[ids]
        if sequences.counts_here:
            has_response = lengths > 0
            metrics["mismatch/masked_sequences_share"] = Mean(
                (has_response & ~accepted_sequences).sum(), has_response.sum()
            )
    accepted = accepted_tokens & accepted_sequences[ids]
    if kind != "token_truncated":
        metrics["mismatch/masked_share"] = masked_share(~accepted, mask, count)
    inside = mask & accepted
    metrics["mismatch/weight/mean"] = masked_mean(weights, inside, inside.sum())
    metrics["mismatch/weight/max"] = masked_max(weights, inside)
    return Correction(weights, accepted_tokens, accepted_sequences, metrics)


def _sequence_sums(difference: Tensor, mask: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """(log rho(y), response tokens), float64 [S] each, of whole sequences."""
    per_token = torch.stack([difference.double(), torch.ones_like(difference, dtype=torch.float64)], dim=1)
    sums = per_token.new_zeros(sequences.num, 2)
    sums.index_add_(0, sequences.ids, torch.where(mask[:, None], per_token, 0.0))
    log_ratio, lengths = sequences.total(sums).unbind(1)
    return log_ratio, lengths


def mismatch_metrics(difference: Tensor, rollout_log_probs: Tensor, response_mask: Tensor) -> Metrics:
    """Metrics of the gap over the response tokens of one microbatch.

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


def metrics_by_version(difference: Tensor, staleness_steps: Tensor, response_mask: Tensor) -> Metrics:
    """The gap apart for what the step's own weights wrote and for what older ones did, in one microbatch.

    Between the same weights it is the engine's rounding alone; between others, rounding and what the updates in between
    have changed. Tokens whose version nobody recorded count in neither.

    Args:
        difference: [T], from `log_prob_difference`.
        staleness_steps: int [T], -1 where unknown.
    """
    metrics: Metrics = {}
    for name, chosen in (("newest_version", staleness_steps == 0), ("older_versions", staleness_steps > 0)):
        mask = response_mask & chosen
        count = mask.sum()
        metrics |= {
            f"mismatch/{name}/log_prob_difference/mean": masked_mean(difference, mask, count),
            f"mismatch/{name}/log_prob_difference/std": masked_std(difference, mask, count),
            f"mismatch/{name}/log_prob_difference/absmean": masked_mean(difference.abs(), mask, count),
            f"mismatch/{name}/log_prob_difference/absmax": masked_max(difference.abs(), mask),
            f"mismatch/{name}/share": Mean(count, response_mask.sum()),
        }
    return metrics


def _inside(log_ratio: Tensor, low: float, high: float) -> Tensor:
    """bool: whether low <= exp(log_ratio) <= high. NaN counts as inside: masked, it would never stop the run."""
    return ~((log_ratio < math.log(low)) | (log_ratio > math.log(high)))
