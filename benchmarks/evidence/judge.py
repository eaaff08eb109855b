"""A verifier that needs no answer, so that a training run of a random model has something to learn."""

from __future__ import annotations

from megatron_fipo.verifiers.verdict import Verdict


def by_length(response: str, reference: object, finish_reason: str) -> Verdict:
    """Judge responses of an odd number of characters as right."""
    return Verdict(float(len(response) % 2))
