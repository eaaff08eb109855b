"""A layout's record against the one process': six quantities, each with its bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.certify.computation import Record, TokenRecord
from megatron_fipo.config import FipoConfig
from megatron_fipo.rl.future_kl import future_kl_reference
from megatron_fipo.rl.objective import participates

SMALLEST_SHARE = 1e-3
"""A parameter's gradient is measured against its own norm, but at least this share of the norm of all: gradients that
cancel to nearly nothing have no relative error to speak of."""


@dataclass(frozen=True)
class Comparison:
    """Quantities by which a layout is compared.

    Attributes:
        layout, reference: what each computed.
        start: weights before the first update, by Hugging Face name.
        objective: the objective of both.
    """

    layout: Record
    reference: Record
    start: dict[str, Tensor]
    objective: FipoConfig


@dataclass(frozen=True)
class Quantity:
    """One column of the certificate.

    Attributes:
        heading: the column's heading.
        meaning: what is measured, in words.
        bounds: its bounds, by dtype of the model. Those of bfloat16 are measured: two to four times the largest
            difference of eight layouts on the CPU with the small model, where rounding to 8 bits dominates gradients
            and weights. Log-probs are float32 in both, so what is computed from them keeps its bounds.
        measure: 0 for no difference, infinite where tokens or parameters do not correspond; None where there is no
            such quantity: without Future-KL, or of a layout that went no further than the first update.
    """

    heading: str
    meaning: str
    bounds: dict[str, float]
    measure: Callable[[Comparison], float | None]


def _gradients(comparison: Comparison) -> float:
    found, expected = comparison.layout.gradients, comparison.reference.gradients
    if found.keys() != expected.keys():
        return math.inf
    total = _norm(expected)
    return max(
        float((found[name].double() - tensor.double()).norm())
        / max(float(tensor.double().norm()), SMALLEST_SHARE * total)
        for name, tensor in expected.items()
    )


def _grad_norm(comparison: Comparison) -> float:
    expected = comparison.reference.grad_norm
    return abs(comparison.layout.grad_norm - expected) / expected


def _loss(comparison: Comparison) -> float:
    tokens = comparison.reference.tokens
    scale = float(tokens.token_loss[tokens.in_loss].double().abs().mean())
    return abs(comparison.layout.loss - comparison.reference.loss) / scale


def _influence_weights(comparison: Comparison) -> float | None:
    if not comparison.objective.future_kl:
        return None
    found, expected = comparison.layout.tokens, comparison.reference.tokens
    if not torch.equal(found.places, expected.places) or not torch.equal(found.in_loss, expected.in_loss):
        return math.inf
    return float((found.influence_weights - expected.influence_weights).abs().max())


def _future_kl(comparison: Comparison) -> float | None:
    """Against the float64 recurrence over the layout's own shifts, relative to what the sum could be at most."""
    tokens = comparison.layout.tokens
    if tokens.future_kl is None:
        return None
    x = _summands(tokens, comparison.objective)
    worst = 0.0
    for sample in tokens.samples.unique():
        own = tokens.samples == sample
        positions = tokens.positions[own]
        dense = torch.zeros(int(positions.max()) + 1, dtype=torch.float64)
        dense[positions] = x[own]
        cu_seqlens = torch.tensor([0, len(dense)])
        half_life = comparison.objective.half_life_tokens
        exact = future_kl_reference(dense, cu_seqlens, half_life)[positions]
        scale = future_kl_reference(dense.abs(), cu_seqlens, half_life)[positions]
        error = (tokens.future_kl[own].double() - exact).abs()
        # Where there is nothing to sum up, the sum must be nothing.
        worst = max(worst, float(torch.where(error > 0, error / scale, 0.0).max()))
    return worst


def _summands(tokens: TokenRecord, objective: FipoConfig) -> Tensor:
    """float64 [N] what Future-KL sums up."""
    shift = tokens.log_prob_shift
    return torch.where(participates(shift.exp(), objective), shift, 0.0).double()


def _weights(comparison: Comparison) -> float | None:
    found, expected = comparison.layout.weights, comparison.reference.weights
    if not found:
        return None
    if found.keys() != expected.keys():
        return math.inf
    difference = {name: found[name].double() - tensor.double() for name, tensor in expected.items()}
    moved = {name: tensor.double() - comparison.start[name].double() for name, tensor in expected.items()}
    return _norm(difference) / _norm(moved)


def _norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


QUANTITIES = (
    Quantity(
        "gradients",
        "first update, largest over parameters: ||g - g'|| / ||g'||, ||g'|| at least 1e-3 of all parameters' norm",
        {"float32": 1e-5, "bfloat16": 5e-2},
        _gradients,
    ),
    Quantity("gradient norm", "first update: |n - n'| / n'", {"float32": 1e-5, "bfloat16": 5e-3}, _grad_norm),
    Quantity("loss", "first update: |l - l'| / mean |token loss|", {"float32": 1e-5, "bfloat16": 1e-5}, _loss),
    Quantity(
        "influence weights",
        "first update, largest over tokens: |f - f'|; infinite if other tokens are in the loss",
        {"float32": 2e-5, "bfloat16": 2e-5},
        _influence_weights,
    ),
    Quantity(
        "future_kl",
        "first update, largest over tokens, against the float64 recurrence: |F - F64| / sum of gamma^k |x|",
        {"float32": 2e-6, "bfloat16": 2e-6},
        _future_kl,
    ),
    Quantity(
        "weights",
        "after the last update: ||p - p'|| / ||p' - start||",
        {"float32": 1e-4, "bfloat16": 5e-1},
        _weights,
    ),
)


def measure(comparison: Comparison) -> list[float | None]:
    """Every quantity, in the order of QUANTITIES."""
    return [quantity.measure(comparison) for quantity in QUANTITIES]


def breaches(values: list[float | None], dtype: str) -> list[Quantity]:
    """The quantities whose value is beyond its bound, or no number."""
    return [
        quantity
        for quantity, value in zip(QUANTITIES, values, strict=True)
        if value is not None and not value <= quantity.bounds[dtype]
    ]
