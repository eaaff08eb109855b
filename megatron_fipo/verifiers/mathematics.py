r"""Mathematics: the final answer equals the reference, as a number, as text or as a mathematical object (math-verify).

Three conventions say where the final answer stands, each a verifier of its own:

- `math`: at the marker that comes last in the response, \boxed{...}, "Answer:" or "####".
- `math_answer`: after the last "Answer:", within the response's last 300 characters, as DAPO's reward has it. A \boxed
  elsewhere does not count; one behind "Answer:" is unwrapped.
- `math_boxed`: in the last \boxed{...}.

Earlier answers do not count, and a response without its marker has no answer. A response cut at the length limit is
judged by what it has written, like any other.

What counts as equal is docs/verifiers.md's to say, and each rule is in one place of `answers`: answers are cleaned
(`math_text`), read into what they say (`answers.reader`), and compared (`answers.equality`); equal ones have one text
(`answers.canonical`), which is the verdict's answer. Values are exact. Prose ("The answer is 5") is no answer, nor is
what `math_text.is_computable` finds too large, since it would keep computer algebra busy for ever.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from megatron_fipo.verifiers.answer_markers import last_answer_line, last_boxed, last_marked_answer
from megatron_fipo.verifiers.answers.canonical import bounded, canonical
from megatron_fipo.verifiers.answers.equality import equal_answers
from megatron_fipo.verifiers.answers.reader import read
from megatron_fipo.verifiers.answers.readings import Reading
from megatron_fipo.verifiers.answers.size_limit import TooLargeError, size_limit
from megatron_fipo.verifiers.cpu_limit import CpuLimitError, cpu_limit
from megatron_fipo.verifiers.math_text import cleaned, is_computable, without_layout
from megatron_fipo.verifiers.verdict import Verdict

MAX_ALGEBRA_CPU_S = 4.0
"""Longest computation on one answer; one that takes longer is wrong, not an error: the response brought it about."""

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers are wrong, unless the reference is about as long; public problems have a fifth of that at most."""

MAX_SHOWN_CHARACTERS = 200
"""How much of an answer the verdict carries, for counts and reports."""

_GIVEN_UP = (
    CpuLimitError, TooLargeError, RecursionError, MemoryError, ArithmeticError, ValueError, TypeError, AttributeError,
    LookupError, NotImplementedError,
)  # fmt: skip
"""What ends a computation without a result. Computer algebra raises whatever its code comes across, such as its
PrecisionExhausted over the floor of 10^{4000} pi."""

DAPO_TAIL_CHARACTERS = 300
"""How much of a response's end DAPO's reward reads (arXiv 2503.14476 and its public code)."""


def verify(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    r"""Judge the answer at the last marker of any kind, against a number, LaTeX, or a worked solution with a marker.

    Raises:
        ValueError: if the reference is empty.
    """
    return _judge(last_marked_answer(response_text), reference)


def verify_answer_line(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Judge the answer behind the last "Answer:" of the response's last 300 characters; raises as `verify` does."""
    found = last_answer_line(response_text[-DAPO_TAIL_CHARACTERS:], number_signs=False)
    return _judge(found[1] if found else None, reference)


def verify_boxed(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    r"""Judge the content of the last \boxed{...}; raises as `verify` does."""
    found = last_boxed(response_text)
    return _judge(found[1] if found else None, reference)


def _judge(answer: str | None, reference: Any) -> Verdict:
    if not answer:
        return Verdict(0.0)
    reference_text = str(reference)
    if len(answer) > max(MAX_ANSWER_CHARACTERS, 4 * len(reference_text)):
        return Verdict(0.0, answer[:MAX_SHOWN_CHARACTERS])
    correct, shown = _compared(answer, reference_text)
    return Verdict(float(correct), shown)


@lru_cache(maxsize=16384)
def _compared(answer: str, reference_text: str) -> tuple[bool, str]:
    """Whether an answer is right, and its canonical text; kept, since a group's responses give few different ones."""
    gold_text, gold, gold_shown = _gold(reference_text)
    text = cleaned(_unwrapped(answer))
    if without_layout(text) == without_layout(gold_text):
        return True, gold_shown
    if not is_computable(text):
        return False, bounded(text)
    try:
        with cpu_limit(MAX_ALGEBRA_CPU_S), size_limit():
            reading = read(text)
            if equal_answers(reading, gold):
                return True, gold_shown
            shown = canonical(reading, text)
            # Where only units tell them apart, a wrong answer does not vote for the right one.
            return False, shown if shown != gold_shown else bounded(f"not {without_layout(text)}")
    except _GIVEN_UP:
        return False, bounded(text)  # the answer's doing: the reference was read before


@lru_cache(maxsize=4096)
def _gold(reference_text: str) -> tuple[str, Reading, str]:
    """A reference's cleaned text, its reading, and its canonical text; kept, since all responses of a group share one.

    Raises:
        ValueError: if there is nothing in it.
    """
    text = cleaned(_unwrapped(last_marked_answer(reference_text) or reference_text))
    if not text:
        raise ValueError(
            f"reference {reference_text!r:.200} cannot be read as mathematics; the verifier 'exact' compares text"
        )
    reading = read(text)
    try:
        with cpu_limit(MAX_ALGEBRA_CPU_S), size_limit():
            return text, reading, canonical(reading, text)
    except _GIVEN_UP:
        return text, reading, bounded(text)


def _unwrapped(answer: str) -> str:
    """Content of the box that an answer begins with, dollar signs aside; else the answer."""
    if "boxed" not in answer and "fbox" not in answer:
        return answer
    boxed = last_boxed(answer.strip().lstrip("$*( "))
    return _unwrapped(boxed[1]) if boxed is not None and boxed[0] == 0 else answer
