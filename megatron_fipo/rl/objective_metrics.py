"""What one microbatch tells about the policy and its influence weights: everything that the paper plots per token.

Shapes: T packed tokens (local ones on a context-parallel rank), S sequences. All values stay tensors on their device,
and each is a reduction, so that microbatches and ranks merge to what one process would have measured. Means are over
the response tokens before the sequence filter, as in the public code.

`ratio_negative` and `ratio_positive` are the ratios of tokens with negative and positive advantage. Their quantiles
come from histograms of the log-prob shift; see `shift_histograms`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig
from megatron_fipo.metrics.reductions import Histogram, Max, Mean, Metrics, Min, Quantiles, Std, Sum

WEIGHT_MARGIN = 1e-7
"""A weight counts as clipped within this of either end of the range, as in the public code."""
SMALL_RATIO = 1e-3
NEGATIVE_QUANTILES: Quantiles = (("p75", 0.75), ("p99.5", 0.995), ("p99.9", 0.999))
POSITIVE_QUANTILES: Quantiles = (("p25", 0.25), ("median", 0.5), *NEGATIVE_QUANTILES)

HISTOGRAM_SCALE = 1e-6
HISTOGRAM_STEP = 0.01
HISTOGRAM_HALF_BINS = 1751
"""Bin edges are HISTOGRAM_SCALE * sinh(HISTOGRAM_STEP * k) for k = -1751 … 1751: from -20 to 20, 1 % wide relative to
their place beyond the scale (1.4 % at it) and 1e-8 wide at 0, where an edge lies."""


def policy_metrics(
    *,
    shift: Tensor,
    advantages: Tensor,
    weights: Tensor,
    future_kl: Tensor | None,
    response_mask: Tensor,
    num_filtered: Tensor | None,
    loss: tuple[Tensor, Tensor],
    reference_kl: Tensor | None,
    entropy: Tensor | None,
    config: FipoConfig,
) -> Metrics:
    """Metrics of one microbatch. Per-token arguments are detached and [T]; `objective.policy_loss` says what they mean.

    Args:
        num_filtered: 0-d, sequences that the filter dropped; None on the ranks that do not count sequences.
        loss: (loss_sum, normalizer).
    """
    ratio = shift.exp()
    count = response_mask.sum()
    weighted = weights * advantages
    negative, positive = response_mask & (advantages < 0), response_mask & (advantages > 0)
    clipped_ratio = ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    negative_shifts, positive_shifts = shift_histograms(shift, negative, positive)

    metrics: Metrics = {
        "policy/loss/mean": Mean(*loss),
        "policy/response_tokens": Sum(count),
        "policy/kl/mean": masked_mean(-shift, response_mask, count),
        "policy/clip_fraction": masked_share(-weighted * clipped_ratio > -weighted * ratio, response_mask, count),
        "policy/log_prob_shift/std": masked_std(shift, response_mask, count),
        "policy/log_prob_shift/absmax": masked_max(shift.abs(), response_mask),
        "policy/ratio_negative": negative_shifts,
        "policy/ratio_negative/max": masked_max(ratio, negative),
        "policy/ratio_positive": positive_shifts,
        "policy/ratio_positive/min": masked_min(ratio, positive),
        "policy/ratio_positive/max": masked_max(ratio, positive),
        "policy/ratio_positive/share_below_1e-3": masked_share(ratio < SMALL_RATIO, positive, positive.sum()),
    }
    for name, low, high in (("2_to_3", 2, 3), ("3_to_4", 3, 4), ("4_to_dual_clip", 4, config.dual_clip or math.inf)):
        metrics[f"policy/ratio_negative/share_{name}"] = masked_share((ratio >= low) & (ratio < high), negative, count)
    if config.dual_clip is not None:
        metrics["policy/dual_clip_fraction"] = masked_share(
            ratio > config.dual_clip, response_mask & (weighted < 0), count
        )
    if entropy is not None:
        metrics["policy/entropy/mean"] = masked_mean(entropy, response_mask, count)
    if reference_kl is not None:
        metrics["policy/reference_kl/mean"] = masked_mean(reference_kl, response_mask, count)
    if future_kl is not None:
        metrics |= _fipo_metrics(weights, future_kl, response_mask, count, config)
    if num_filtered is not None:
        metrics["fipo/filtered_sequences"] = Sum(num_filtered)
    return metrics


def shift_histograms(shift: Tensor, negative: Tensor, positive: Tensor) -> tuple[Histogram, Histogram]:
    """Histograms of the log-prob shift [T] where `negative` and where `positive`, with quantiles reported as ratios.

    Bins are even in asinh(shift / HISTOGRAM_SCALE): fine where shifts are mere rounding noise, 1 % wide where they are
    large, and the same in every microbatch, so that parts add up.
    """
    num_bins = 2 * HISTOGRAM_HALF_BINS
    place = torch.asinh(shift / HISTOGRAM_SCALE) / HISTOGRAM_STEP
    bins = (place.floor().long() + HISTOGRAM_HALF_BINS).clamp(0, num_bins - 1)
    edges = _bin_edges(shift.device)

    def histogram(mask: Tensor, quantiles: Quantiles) -> Histogram:
        counts = torch.zeros(num_bins, dtype=torch.float64, device=shift.device)
        return Histogram(counts.index_add_(0, bins, mask.double()), edges, quantiles, exponentiate=True)

    return histogram(negative, NEGATIVE_QUANTILES), histogram(positive, POSITIVE_QUANTILES)


@lru_cache(maxsize=8)
def _bin_edges(device: torch.device) -> Tensor:
    """float64 [bins + 1]. One tensor for all histograms of a device, which then need no comparing to be added."""
    steps = torch.arange(-HISTOGRAM_HALF_BINS, HISTOGRAM_HALF_BINS + 1, dtype=torch.float64, device=device)
    return HISTOGRAM_SCALE * torch.sinh(HISTOGRAM_STEP * steps)


def _fipo_metrics(weights: Tensor, future_kl: Tensor, mask: Tensor, count: Tensor, config: FipoConfig) -> Metrics:
    """Metrics of Future-KL and the influence weights.

    clipped_share is where the range changed exp(F). clipped_high_share and clipped_low_share are the public code's odd
    definitions, judged after the safety clip and at the very ends of the range: on-policy under [1.0, 1.2] every weight
    is "clipped low". They need not add up to the first.
    """
    unclipped = future_kl.double().exp()
    outside = (unclipped < config.influence_min) | (unclipped > config.influence_max)
    return {
        "fipo/influence_weight/mean": masked_mean(weights, mask, count),
        "fipo/influence_weight/std": masked_std(weights, mask, count),
        "fipo/influence_weight/min": masked_min(weights, mask),
        "fipo/influence_weight/max": masked_max(weights, mask),
        "fipo/influence_weight/clipped_high_share": masked_share(
            weights >= config.influence_max - WEIGHT_MARGIN, mask, count
        ),
        "fipo/influence_weight/clipped_low_share": masked_share(
            weights <= config.influence_min + WEIGHT_MARGIN, mask, count
        ),
        "fipo/influence_weight/clipped_share": masked_share(outside, mask, count),
        "fipo/exp_future_kl/mean": masked_mean(unclipped, mask, count),
        "fipo/exp_future_kl/min": masked_min(unclipped, mask),
        "fipo/exp_future_kl/max": masked_max(unclipped, mask),
        "fipo/future_kl/std": masked_std(future_kl, mask, count),
        "fipo/future_kl/absmax": masked_max(future_kl.abs(), mask),
    }


def masked_mean(values: Tensor, mask: Tensor, count: Tensor) -> Mean:
    return Mean(torch.where(mask, values, 0.0).sum(dtype=torch.float64), count)


def masked_share(condition: Tensor, mask: Tensor, count: Tensor) -> Mean:
    return Mean((condition & mask).sum(), count)


def masked_std(values: Tensor, mask: Tensor, count: Tensor) -> Std:
    masked = torch.where(mask, values.double(), 0.0)
    return Std(masked.sum(), masked.square().sum(), count)


def masked_max(values: Tensor, mask: Tensor) -> Max:
    return Max(torch.where(mask, values, -math.inf).amax())


def masked_min(values: Tensor, mask: Tensor) -> Min:
    return Min(torch.where(mask, values, math.inf).amin())
