r"""Mathematics: the final answer equals the reference, as a number, as text or as a mathematical object.

Three verifiers look for the final answer in different places:

- `math`: at the marker that comes last in the response, \boxed{...}, "Answer:" or "####".
- `math_answer`: after the last "Answer:" in the response's last 300 characters, as in DAPO's reward. A \boxed elsewhere
  does not count; one after "Answer:" is unwrapped.
- `math_boxed`: in the last \boxed{...}.

Earlier answers do not count, and a response without the marker has no answer. A response cut at the length limit is
judged by its text, like any other.

docs/verifiers.md defines which answers are equal, and `answers` implements each rule in one place. Answers are cleaned
(`math_text`), parsed (`answers.reader`) and compared (`answers.equality`). All spellings of one answer have one text
(`answers.canonical`), which is the verdict's answer. Values are exact. Prose ("The answer is 5") is wrong, and so is an
answer that `math_text.is_computable` rejects as too large, unless its text equals the reference's.
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
"""CPU time for one answer. If it takes longer, the answer is wrong and not an error, since the response caused it."""

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers are wrong, unless the reference has at least a quarter of their length. The references of public
problems have a fifth of this at most."""

MAX_SHOWN_CHARACTERS = 200
"""Longest answer in a verdict, for counts and reports."""

_GIVEN_UP = (
    CpuLimitError, TooLargeError, RecursionError, MemoryError, ArithmeticError, ValueError, TypeError, AttributeError,
    LookupError, NotImplementedError,
)  # fmt: skip
"""Exceptions that end a computation without a result. Computer algebra raises many kinds, such as PrecisionExhausted
over the floor of 10^{4000} pi."""

DAPO_TAIL_CHARACTERS = 300
"""Length of the end of a response that DAPO's reward reads (arXiv 2503.14476 and its public code)."""


def verify(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    r"""Judge the answer at the last marker of any kind, against a number, LaTeX, or a worked solution with a marker.

    Raises:
        ValueError: if the reference is empty.
    """
    return _judge(last_marked_answer(response_text), reference)


def verify_answer_line(response_text: str, reference: Any, finish_reason: str) -> Verdict:
    """Judge the answer after the last "Answer:" in the response's last 300 characters; raises as `verify` does."""
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
    """Whether an answer is right, and its canonical text. Cached: a group's responses have few distinct answers."""
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
            # Canonical texts have no units: an answer wrong by its unit must not count as a vote for the right one.
            return False, shown if shown != gold_shown else bounded(f"not {without_layout(text)}")
    except _GIVEN_UP:
        return False, bounded(text)  # caused by the answer, since the reference was read before


@lru_cache(maxsize=4096)
def _gold(reference_text: str) -> tuple[str, Reading, str]:
    """A reference's cleaned text, its reading and its canonical text. Cached, since a group's responses share it.

    Raises:
        ValueError: if the reference is empty.
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
    """Content of the box at the beginning of an answer, after dollar signs and stars; without a box, the answer."""
    if "boxed" not in answer and "fbox" not in answer:
        return answer
    boxed = last_boxed(answer.strip().lstrip("$*( "))
    return _unwrapped(boxed[1]) if boxed is not None and boxed[0] == 0 else answer
