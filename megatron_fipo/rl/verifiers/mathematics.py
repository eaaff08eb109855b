r"""Mathematics: the final answer equals the reference, as a number, as text or as a mathematical object (math-verify).

Three conventions say where the final answer stands, each a verifier of its own:

- `math`: at the marker that comes last in the response, \boxed{...}, "Answer:" or "####".
- `math_answer`: after the last "Answer:", within the response's last 300 characters, as DAPO's reward has it. A \boxed
  elsewhere does not count; one behind "Answer:" is unwrapped.
- `math_boxed`: in the last \boxed{...}.

Earlier answers do not count, and a response without its marker has no answer. A response cut at the length limit is
judged by what it has written, like any other.

What is accepted: another spelling of the same value (\frac12, 1/2, 0.5; 1,234 and 1{,}234; 2\frac12 for 5/2; 1.5e3), a
set in another order, an equation for its right-hand side and the reverse ("x = 5" for 5), 50% both for 50 and for 1/2,
a unit or a currency that only one of the two names, equivalent algebra. Values are exact: 0.33 is not 1/3, 1 and 2 is
not 1. Not accepted: prose ("The answer is 5"), several answers where one is asked for, another unit than the
reference's, and whatever `math_text.is_computable` finds too large, since it would keep computer algebra busy for ever.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

import math_verify

from megatron_fipo.rl.verifiers.answer_markers import last_answer_line, last_boxed, last_marked_answer
from megatron_fipo.rl.verifiers.cpu_limit import CpuLimitError, cpu_limit
from megatron_fipo.rl.verifiers.math_text import as_words, cleaned, is_computable, without_layout
from megatron_fipo.rl.verifiers.plain_numbers import PlainNumber, read_plain_number
from megatron_fipo.rl.verifiers.verdict import Verdict

# It warns, once per process, that its own time-outs are off: they use the alarm signal, which is the worker's.
logging.getLogger("math_verify").setLevel(logging.ERROR)

MAX_ALGEBRA_CPU_S = 4.0
"""Longest computation on one answer; one that takes longer is wrong, not an error: the response brought it about."""

_VARIABLE_EQUALS = re.compile(r"^[A-Za-z]\s*=")

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers are wrong, unless the reference is about as long; public problems have a fifth of that at most."""

MAX_SHOWN_CHARACTERS = 200
"""How much of an answer the verdict carries, for counts and reports."""

DAPO_TAIL_CHARACTERS = 300
"""How much of a response's end DAPO's reward reads (arXiv 2503.14476 and its public code)."""


def verify(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    r"""Judge the answer at the last marker of any kind, against a number, LaTeX, or a worked solution with a marker.

    Raises:
        ValueError: if the reference cannot be read as mathematics and the answer does not equal it literally.
    """
    return _judge(last_marked_answer(response_text), reference)


def verify_answer_line(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Judge the answer behind the last "Answer:" of the response's last 300 characters; raises as `verify` does."""
    found = last_answer_line(response_text[-DAPO_TAIL_CHARACTERS:])
    return _judge(found[1] if found else None, reference)


def verify_boxed(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    r"""Judge the content of the last \boxed{...}; raises as `verify` does."""
    found = last_boxed(response_text)
    return _judge(found[1] if found else None, reference)


def _judge(answer: str | None, reference: Any) -> Verdict:
    """Compare a final answer with a reference, the cheapest comparison first."""
    reference_text = str(reference).strip()
    gold = cleaned(last_marked_answer(reference_text) or reference_text)
    if not answer:
        return Verdict(0.0)
    if len(answer) > max(MAX_ANSWER_CHARACTERS, 4 * len(gold)):
        return Verdict(0.0, answer[:MAX_SHOWN_CHARACTERS])
    answer = _unwrapped(answer)
    shown = answer[:MAX_SHOWN_CHARACTERS]
    answer = cleaned(answer)
    return Verdict(float(_equal(answer, gold, reference_text)), shown)


@lru_cache(maxsize=16384)
def _equal(answer: str, gold: str, reference_text: str) -> bool:
    """The cheapest comparison that can decide; kept, since the responses of a group give few different answers."""
    if without_layout(answer) == without_layout(gold):
        return True
    decided = _equal_as_numbers(answer, gold)
    if decided is None:
        decided = _equal_as_words(answer, gold)
    return _equal_as_mathematics(answer, gold, reference_text) if decided is None else decided


def _unwrapped(answer: str) -> str:
    """Content of the box that an answer begins with, dollar signs aside; else the answer."""
    boxed = last_boxed(cleaned(answer))
    return _unwrapped(boxed[1]) if boxed is not None and boxed[0] == 0 else answer


def _equal_as_numbers(answer: str, gold: str) -> bool | None:
    """Equality where both are plain numbers, the answer perhaps behind "x ="; None where one of them is not."""
    gold_number = _read_gold_number(gold)
    if gold_number is None:
        return None
    number = read_plain_number(_VARIABLE_EQUALS.sub("", answer))
    return None if number is None else number.equals(gold_number)


def _equal_as_words(answer: str, gold: str) -> bool | None:
    """Equality where one of them is in words, or a single letter in brackets; None where it takes mathematics.

    A word is never read as a product of its letters: "listen" is not "silent".
    """
    gold_words, words = as_words(gold), as_words(answer)
    if words is not None and words == gold_words:
        return True
    if any(text is not None and len(text) > 1 for text in (gold_words, words)):
        return False
    return None


def _equal_as_mathematics(answer: str, gold: str, reference_text: str) -> bool:
    """Equality by math-verify.

    Raises:
        ValueError: if the reference cannot be read.
    """
    parsed_gold = _parse_gold(gold)
    if not parsed_gold:
        raise ValueError(
            f"reference {reference_text!r:.200} cannot be read as mathematics; the verifier 'exact' compares text"
        )
    if not is_computable(answer):
        return False
    try:
        with cpu_limit(MAX_ALGEBRA_CPU_S):
            parsed_answer = _parse(answer)
            return bool(parsed_answer) and math_verify.verify(
                list(parsed_gold), parsed_answer, allow_set_relation_comp=True, timeout_seconds=None
            )
    except (CpuLimitError, RecursionError, MemoryError, OverflowError):
        return False  # the answer's doing: the reference was read before


@lru_cache(maxsize=4096)
def _read_gold_number(gold: str) -> PlainNumber | None:
    return read_plain_number(gold)


@lru_cache(maxsize=4096)
def _parse_gold(gold: str) -> tuple[Any, ...]:
    """A reference's readings; kept, since all responses of a group share one."""
    return tuple(_parse(gold))


def _parse(expression: str) -> list[Any]:
    r"""math-verify's readings of an expression: sympy objects first, the text last; [] if there is none.

    Inside \boxed{} the whole expression counts; from bare text math-verify would pick out a number somewhere.
    """
    return list(math_verify.parse(rf"\boxed{{{expression}}}", parsing_timeout=None))
