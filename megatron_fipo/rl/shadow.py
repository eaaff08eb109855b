"""Shadow objectives: what Future-KL and the influence weights would be under other settings, on the same updates.

Nothing is trained on them. They are sums of the same shifts, taken by the same functions as those that are trained on
(`objective` hands those over), so a shadow with the objective's own settings gives the objective's numbers.

Shapes: T packed tokens (local ones on a context-parallel rank), K shadow objectives. As in `objective_metrics` all
values stay on their device, and measure the response tokens before the sequence filter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from megatron_fipo.config import FipoConfig, shadow_objectives
from megatron_fipo.metrics.reductions import Correlation, Max, Mean, Metrics, Std
from megatron_fipo.rl.sequences import Sequences

Terms = Callable[[FipoConfig], tuple[Tensor, Tensor]]
"""`objective.future_kl_terms` of a microbatch under other settings: ([T] shifts, bool [T] where they enter)."""
Weights = Callable[[Tensor, FipoConfig], Tensor]
"""`objective.influence_weights` of a microbatch, by Future-KL [T] and settings: [T]."""


def shadow_metrics(
    terms: Terms, weights: Weights, in_use: Tensor, response_mask: Tensor, sequences: Sequences, config: FipoConfig
) -> Metrics:
    """`shadow/<name>/…` of one microbatch. Collective where `sequences` are shared: one exchange for all of them.

    Args:
        in_use: [T] the weights that are trained on, detached.
    """
    objectives = _objectives(config)
    shadows = [*objectives.values()]
    x: dict[tuple[bool, float | None], Tensor] = {}
    for each in shadows:
        if _participation(each) not in x:
            shifts, enters = terms(each)
            x[_participation(each)] = torch.where(enters, shifts, 0.0)
    future_kl = sequences.suffix_sums(
        [x[_participation(each)] for each in shadows], [each.half_life_tokens for each in shadows]
    )
    found = [weights(sums, each) for sums, each in zip(future_kl, shadows, strict=True)]
    return _metrics(objectives, torch.stack(future_kl), torch.stack(found), in_use, response_mask)


def _metrics(
    objectives: Mapping[str, FipoConfig], future_kl: Tensor, weights: Tensor, in_use: Tensor, mask: Tensor
) -> Metrics:
    """Metrics of `future_kl` and `weights` [K, T], taken of all shadows together: a device then has less to launch."""
    count = mask.sum()
    own, others = _from_one(in_use, mask), _from_one(weights, mask)
    own_total, own_squared = own.sum(), own @ own
    totals, squared, products = others.sum(1), others.square().sum(1), others @ own
    masked = torch.where(mask, future_kl.double(), 0.0)
    lows, highs = _log_bounds(
        tuple((each.influence_min, each.influence_max) for each in objectives.values()), mask.device
    )
    # As fipo/influence_weight/clipped_share has it: where the range changes exp(F).
    clipped = (((future_kl < lows) | (future_kl > highs)) & mask).sum(1)
    sums, sums_squared = masked.sum(1), masked.square().sum(1)
    largest = torch.where(mask, future_kl.abs(), -math.inf).amax(1)
    metrics: Metrics = {}
    for k, name in enumerate(objectives):
        metrics |= {
            f"shadow/{name}/influence_weight/mean": Mean(totals[k] + count, count),
            f"shadow/{name}/influence_weight/std": Std(totals[k], squared[k], count),
            f"shadow/{name}/influence_weight/clipped_share": Mean(clipped[k], count),
            f"shadow/{name}/influence_weight/correlation": Correlation(
                totals[k], own_total, squared[k], own_squared, products[k], count
            ),
            f"shadow/{name}/future_kl/std": Std(sums[k], sums_squared[k], count),
            f"shadow/{name}/future_kl/absmax": Max(largest[k]),
        }
    return metrics


def _from_one(weights: Tensor, mask: Tensor) -> Tensor:
    """float64, weights less 1 where the mask is set, else 0: sums of them tell small spreads from rounding."""
    return torch.where(mask, weights.double() - 1.0, 0.0)


@lru_cache(maxsize=16)
def _objectives(config: FipoConfig) -> dict[str, FipoConfig]:
    return shadow_objectives(config)


@lru_cache(maxsize=16)
def _log_bounds(ranges: tuple[tuple[float, float], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """float64 [K, 1] each: the values of F beyond which the range clips exp(F). Filled there, so nothing is sent."""

    def column(values: Iterable[float]) -> Tensor:
        logarithms = [math.log(value) if value else -math.inf for value in values]
        return torch.stack([torch.full((1,), each, dtype=torch.float64, device=device) for each in logarithms])

    return column(low for low, _ in ranges), column(high for _, high in ranges)


def _participation(objective: FipoConfig) -> tuple[bool, float | None]:
    """What decides which tokens enter Future-KL; shadows that agree in it share their summands."""
    return objective.filter_extreme_ratios, objective.dual_clip
