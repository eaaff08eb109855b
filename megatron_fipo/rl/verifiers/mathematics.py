r"""Mathematics: the final answer is equal to the reference as a mathematical object, by math-verify.

The final answer is what stands in the last \boxed{...} or after the last "Answer:" or "####", whichever comes last in
the response. Earlier answers do not count, and a response without such a marker has no answer. A response cut at the
length limit is judged by what it has written, like any other.

math-verify's own time-outs use signals, which work in a main thread only; they are off here: `pool` enforces its own.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import math_verify

from megatron_fipo.rl.verifiers.answer_markers import last_marked_answer
from megatron_fipo.rl.verifiers.verdict import Verdict

# It warns, once per process, that its time-outs are off.
logging.getLogger("math_verify").setLevel(logging.ERROR)

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_PLAIN_NUMBER = re.compile(rf"(?:\\?\$)?\s*({_NUMBER})\s*(?:\\?\$)?")
# A unit is one or more words of three letters and more, so that "2 pi" and "5 x" stay products.
_NUMBER_WITH_UNIT = re.compile(rf"(?:\\?\$)?\s*({_NUMBER})\s*(?:\\?\$)?(?:\s+[A-Za-z]{{3,}}(?:\s+[A-Za-z]+)*)?")


def verify(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Compare the final answer with the reference, given as a number, as LaTeX or as a worked solution with a marker.

    Where the reference is a plain number, thousands' commas, a currency sign and a unit in words around the answer's
    number are ignored ("$1,200 dollars").

    Raises:
        ValueError: if the reference cannot be read as mathematics and the answer does not equal it literally.
    """
    reference_text = str(reference).strip()
    gold = last_marked_answer(reference_text) or reference_text
    answer = last_marked_answer(response_text)
    if not answer:
        return Verdict(0.0)
    if answer == gold:
        return Verdict(1.0, answer)
    gold_number = _PLAIN_NUMBER.fullmatch(gold)
    if gold_number is not None and gold_number[1]:
        gold = gold_number[1].replace(",", "")
        number = _NUMBER_WITH_UNIT.fullmatch(answer)
        answer = number[1].replace(",", "") if number is not None and number[1] else answer
    parsed_gold = _parse(gold)
    if not parsed_gold:
        raise ValueError(
            f"reference {reference_text!r:.200} cannot be read as mathematics; the verifier 'exact' compares text"
        )
    parsed_answer = _parse(answer)
    equal = bool(parsed_answer) and math_verify.verify(parsed_gold, parsed_answer, timeout_seconds=None)
    return Verdict(float(equal), answer)


def _parse(expression: str) -> list[Any]:
    r"""math-verify's readings of an expression: sympy objects first, the text last; [] if there is none.

    Inside \boxed{} the whole expression counts; from bare text math-verify would pick out a number somewhere.
    """
    return list(math_verify.parse(rf"\boxed{{{expression}}}", parsing_timeout=None))
