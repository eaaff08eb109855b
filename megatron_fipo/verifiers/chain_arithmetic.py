"""Chain arithmetic: the response stops by itself after "#<number>", and the number is right."""

from __future__ import annotations

import re
from typing import Any

from megatron_fipo.verifiers.verdict import Verdict

_FINAL_NUMBER = re.compile(r"#([0-9]+)\Z")


def verify(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Compare the number after the final "#" with the reference as text: "07" is not "7".

    A response cut at the length limit is not accepted, since another digit might have followed.
    """
    match = _FINAL_NUMBER.search(response_text)
    if match is None or finish_reason != "stop":
        return Verdict(0.0)
    return Verdict(float(match[1] == str(reference)), match[1])
