"""Verifiers that misbehave on purpose; the references of the prompts say how."""

from __future__ import annotations

import os
import time
import zlib
from typing import Any

from megatron_fipo.rl.verifiers.verdict import Verdict


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
