"""Verifiers that misbehave on purpose; the references of the prompts say how."""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

from megatron_fipo.verifiers.verdict import Verdict


def always_wrong(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    return Verdict(0.0, response_text)


def always_right(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    return Verdict(1.0, response_text)


def as_the_reference_says(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Hang, end the process, raise, or judge by a hash of the response, which gives mixed groups."""
    if reference == "hang":
        time.sleep(3600)
    if reference == "crash":
        os._exit(7)
    if reference == "raise":
        raise ArithmeticError("this one cannot be judged")
    return Verdict(float(zlib.crc32(response_text.encode()) % 2), response_text)


def half_by_hash(response: str) -> float:
    """A reward as TRL's users write them: a float, 1 or 0 by a hash of the response, which gives mixed groups."""
    return float(zlib.crc32(response.encode()) % 2)


async def as_the_row_says(completion: str, row: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Right where the row's column says so; fails where the column is not what the prompt's own row holds."""
    assert more["prompt"] == row["prompt"]
    return {"score": row["level"] / 4, "answer": "" if row["level"] else completion, "level": row["level"]}


def a_batch(completions: list[str]) -> list[float]:
    """What a verifier is not: it takes many responses at a time."""
    return [1.0 for _ in completions]


def from_minus_1(response: str) -> int:
    """A reward with another range."""
    return -1
