"""Which procedurally generated questions are kept for evaluation.

Every procedural source divides its questions by a hash of their text: training never draws a question of the held-out
share and evaluation draws from no other, whatever the seeds, the sizes and the order. Different seeds alone would not
do: small tasks repeat themselves, and some generators give seed s + 1 the questions of seed s, shifted by one.
"""

from __future__ import annotations

import hashlib

HELD_OUT_SHARE = 1 / 16
"""Share of all questions that training never sees."""


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out share; depends on nothing but its text."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64
