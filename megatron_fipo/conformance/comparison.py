"""Compares an implementation's results with the recorded ones.

Values per token are compared at the tokens that are in the loss. In the padding, and in responses that the filter
dropped, an implementation may leave anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from megatron_fipo.conformance.recording import Recording

TOLERANCE = 2e-5
"""Bound for float32 results against the recorded float64; for the gradient, relative to its largest entry."""
QUANTITIES = ("loss", "gradient", "normalizer", "final_mask", "future_kl", "influence_weights", "token_loss")
"""All that can be compared, in the order of the table."""


@dataclass(frozen=True)
class Comparison:
    """One quantity of one recording."""

    case: str
    quantity: str
    difference: float
    """The largest difference: absolute; relative for the gradient; in tokens for the mask and the normalizer."""
    bound: float

    @property
    def passes(self) -> bool:
        """Whether the difference is within the bound."""
        return self.difference <= self.bound


def compare(recording: Recording, found: Mapping[str, Tensor]) -> list[Comparison]:
    """Compare everything that was found with what was recorded."""
    return [
        Comparison(recording.case, name, _difference(name, found[name], recording), _bound(name))
        for name in QUANTITIES
        if name in found
    ]


def _bound(name: str) -> float:
    return 0.0 if name in ("normalizer", "final_mask") else TOLERANCE


def _difference(name: str, value: Tensor, recording: Recording) -> float:
    in_loss = recording.final_mask
    if name == "loss":
        return abs(float(value) - recording.loss)
    if name == "normalizer":
        return abs(float(value) - int(in_loss.sum()))
    if name == "final_mask":
        return float((value.bool() != in_loss).sum())
    if name == "gradient":
        return float((value.double() - recording.gradient).abs().max() / recording.gradient.abs().max())
    expected: Tensor = getattr(recording, name)
    return float((value.double() - expected)[in_loss].abs().max())
