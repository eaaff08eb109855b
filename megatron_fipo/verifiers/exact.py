"""Exact match: the whole response equals the reference, apart from white space at both ends."""

from __future__ import annotations

from typing import Any

from megatron_fipo.verifiers.verdict import Verdict


def verify(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Accept a response that equals `str(reference)`; the answer is the whole response.

    A truncated response is judged by its text, like any other.
    """
    answer = response_text.strip()
    return Verdict(float(answer == str(reference).strip()), answer)
