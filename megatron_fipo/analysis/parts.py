"""The visible parts of a response: what is thought before the answer, the answer, and code.

<think>…</think> and what follows; or all before the line of the last \\boxed, "Answer:", "####" or <answer>, and
that line with the rest; or, in the quick-start's chains, 3+9=12; and #12. Blocks of code are cut out of both.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

THINKING, ANSWER, CODE = "thinking", "answer", "code"
PARTS = (THINKING, ANSWER, CODE)

_OPENINGS = ("<think>", "<thinking>", "<reasoning>", "<|begin_of_thought|>")
_CLOSINGS = ("</think>", "</thinking>", "</reasoning>", "<|end_of_thought|>")
_PLAIN_ANSWER_MARKS = ("\\boxed", "####", "<answer>")
_ANSWER_WORDS = ("answer", "antwort", "答案")
_ANSWER_COLON = re.compile(r"(?:answer|antwort|答案)[*_]{0,2}\s{0,4}(?:[:：]|is\b|ist\b|lautet\b|是|为)")
_CHAIN = re.compile(r"[0-9+\-=;?#]{3,}")
_BEGINS_CHAIN = frozenset("0123456789+-=;?#<")
_UNKNOWN = "<unk>"
_FENCE = "```"


@dataclass(frozen=True)
class Part:
    """A stretch of a response."""

    kind: str
    start: int
    end: int


def is_chain(text: str) -> bool:
    """Whether a response is one of the quick-start's chains of sums, such as 3+9=12;12-5=8?7;#7."""
    if not text[:1] or text[0] not in _BEGINS_CHAIN:  # most texts end here, however long they are
        return False
    text = text.replace(_UNKNOWN, "")
    return _CHAIN.fullmatch(text) is not None and "=" in text


def parts_of(lower: str) -> list[Part]:
    """The parts of a response in order; together they are the whole of it.

    A response that marks neither its thoughts nor its answer is one of thinking.

    Args:
        lower: the response in lower case.
    """
    boundary = _end_of_thinking(lower)
    cuts = code_blocks(lower)
    parts, position = [], 0
    for start, end in [*cuts, (len(lower), len(lower))]:
        for kind, begin, until in (
            (THINKING, position, min(boundary, start)),
            (ANSWER, max(position, boundary), start),
        ):
            if begin < until:
                parts.append(Part(kind, begin, until))
        if start < end:
            parts.append(Part(CODE, start, end))
        position = end
    return parts


def _end_of_thinking(lower: str) -> int:
    """Where the answer begins; the length of the response where it does not."""
    if "<" in lower:
        closed = max((at + len(tag) for tag in _CLOSINGS if (at := lower.rfind(tag)) >= 0), default=-1)
        if closed >= 0:
            return closed
        if any(tag in lower[:2000] for tag in _OPENINGS):
            return len(lower)
    if is_chain(lower):
        return at if (at := lower.rfind("#")) >= 0 else len(lower)
    mark = last_answer_mark(lower)
    return lower.rfind("\n", 0, mark) + 1 if mark >= 0 else len(lower)


def last_answer_mark(lower: str) -> int:
    r"""Place of the last \boxed, "####", <answer> or "answer:"; -1 where there is none."""
    # One character is found ten times as fast as a word.
    last = max(lower.rfind(mark) if mark[0] in lower else -1 for mark in _PLAIN_ANSWER_MARKS)
    for word in _ANSWER_WORDS:
        at = lower.rfind(word)
        for _ in range(_MAX_ANSWER_WORDS):
            if at <= last:
                break
            if _ANSWER_COLON.match(lower, at, at + 40):
                last = at
                break
            at = lower.rfind(word, 0, at)
    return last


_MAX_ANSWER_WORDS = 50
"""How many times the word may come without a mark behind its last one; more, and the response speaks of answers."""


def code_blocks(text: str) -> list[tuple[int, int]]:
    """(start, end) of the blocks between ``` marks, with these; one that is not closed extends to the end."""
    blocks, at = [], text.find(_FENCE)
    while at >= 0:
        closing = text.find(_FENCE, at + len(_FENCE))
        end = len(text) if closing < 0 else closing + len(_FENCE)
        blocks.append((at, end))
        at = text.find(_FENCE, end)
    return blocks


def characters_by_part(parts: Sequence[Part]) -> dict[str, int]:
    """Number of characters of each kind of part, those that do not occur too."""
    counts = dict.fromkeys(PARTS, 0)
    for part in parts:
        counts[part.kind] += part.end - part.start
    return counts


def tokens_by_part(parts: Sequence[Part], token_texts: Sequence[str], is_own: Sequence[bool]) -> dict[str, int]:
    """Number of tokens of each kind of part.

    Args:
        parts: of the text that the tokens' texts join to.
        token_texts: text of each token; one within a character has none, and counts where the next one begins.
        is_own: whether the policy wrote the token; others do not count.
    """
    starts = [part.start for part in parts]
    lengths = np.fromiter(map(len, token_texts), dtype=np.int64, count=len(token_texts))
    places = np.cumsum(lengths) - lengths
    counts = dict.fromkeys(PARTS, 0)
    if not parts:
        return counts
    for place, own in zip(places.tolist(), is_own, strict=True):
        if own:
            counts[parts[max(bisect_right(starts, place) - 1, 0)].kind] += 1
    return counts
