"""FIPO written down as somebody else would: one function over [B, L], an L x L matrix of discounts, and its mistakes.

What megatron_fipo computes it with has no part in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MISTAKES = {
    "weights not clipped": "influence_weights",
    "no safety clip": "influence_weights",
    "safety clip to 1": "influence_weights",
    "gamma of half_life + 1": "future_kl",
    "own token left out": "future_kl",
    "discounted from the front": "future_kl",
    "masked tokens counted in": "future_kl",
    "gaps closed up": "future_kl",
    "extreme ratios take part": "future_kl",
    "no sequence filter": "final_mask",
    "filter from one token on": "final_mask",
    "gradient through the weights": "gradient",
    "mean of the responses' means": "loss",
    "sum for the mean": "loss",
    "mean over filtered tokens too": "loss",
    "no dual clip": "token_loss",
    "symmetric clip": "gradient",
    "no clamp of the shift": "future_kl",
}
"""Each mistake, and a quantity in which it must show."""


def loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: Any,
    mistake: str = "",
) -> dict[str, Tensor]:
    """The mean loss, and what it was made of."""
    shift = log_probs - old_log_probs
    if mistake != "no clamp of the shift":
        shift = shift.clamp(-20, 20)
    ratio = shift.exp()
    future_kl = _future_kl(shift, ratio, response_mask, config, mistake)
    weights = future_kl.exp()
    if mistake != "gradient through the weights":
        weights = weights.detach()
    if mistake != "weights not clipped":
        weights = weights.clamp(config.influence_min, config.influence_max)
    safe = {"no safety clip": weights, "safety clip to 1": torch.ones_like(weights)}.get(mistake, weights.clamp(0.8, 1))
    weights = torch.where((advantages < 0) & (ratio > config.safety_ratio), safe, weights)

    extreme = (response_mask & (advantages < 0) & (ratio > config.dual_clip)).sum(1)
    most = {"no sequence filter": 10**6, "filter from one token on": 0}.get(mistake, config.max_dual_clipped_tokens)
    final_mask = response_mask & (extreme <= most)[:, None]

    high = config.clip_ratio_low if mistake == "symmetric clip" else config.clip_ratio_high
    weighted = weights * advantages
    token_loss = torch.maximum(-weighted * ratio, -weighted * ratio.clamp(1 - config.clip_ratio_low, 1 + high))
    if mistake != "no dual clip":
        bounded = torch.minimum(token_loss, -weighted * config.dual_clip)
        token_loss = torch.where(weighted < 0, bounded, token_loss)
    return {
        "loss": _mean(token_loss, response_mask, final_mask, mistake),
        "normalizer": final_mask.sum(),
        "future_kl": future_kl,
        "influence_weights": weights,
        "token_loss": token_loss,
        "final_mask": final_mask,
    }


def _future_kl(shift: Tensor, ratio: Tensor, mask: Tensor, config: Any, mistake: str) -> Tensor:
    if mistake != "gradient through the weights":
        shift = shift.detach()
    takes_part = mask if mistake != "masked tokens counted in" else torch.ones_like(mask)
    if mistake != "extreme ratios take part":
        takes_part = takes_part & (ratio <= config.dual_clip)
    x = torch.where(takes_part, shift, 0.0).double()
    place = mask.cumsum(1) if mistake == "gaps closed up" else torch.arange(x.shape[1])[None]
    distance = place[:, None, :] - place[:, :, None]
    if mistake == "discounted from the front":
        distance = -distance
    half_life = config.half_life_tokens + (mistake == "gamma of half_life + 1")
    behind = torch.arange(x.shape[1])[None, :] - torch.arange(x.shape[1])[:, None]
    first = 1 if mistake == "own token left out" else 0
    kernel = torch.where(behind >= first, 2.0 ** (-distance.double() / half_life), 0.0)
    return (kernel @ x[:, :, None])[:, :, 0].float()


def _mean(token_loss: Tensor, response_mask: Tensor, final_mask: Tensor, mistake: str) -> Tensor:
    masked = torch.where(final_mask, token_loss, 0.0)
    if mistake == "mean of the responses' means":
        lengths = final_mask.sum(1)
        return (masked.sum(1) / lengths.clamp(min=1)).sum() / (lengths > 0).sum()
    if mistake == "sum for the mean":
        return masked.sum()
    return masked.sum() / (response_mask if mistake == "mean over filtered tokens too" else final_mask).sum()
