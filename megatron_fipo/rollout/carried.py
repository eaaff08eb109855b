"""Responses that a step has begun and a later one goes on with, or trains on."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.rl.trajectory import Trajectory


@dataclass(frozen=True)
class Carried:
    """One such response.

    Attributes:
        response: what is written of it. Its finish_reason is "abort" where more is to be written.
        begun_at_step: the step that has begun it, whose weights wrote its oldest token; part of the key of its
            randomness.
        is_judged: whether it has its verdict, and waits for nothing but the prompts before it.
    """

    response: Trajectory
    begun_at_step: int
    is_judged: bool

    @property
    def num_tokens(self) -> int:
        """Tokens of the response so far."""
        return self.response.num_response_tokens
