r"""Scans cleaned LaTeX with regard to brackets: finds tokens at the top level, splits there, removes outer brackets."""

from __future__ import annotations

import re
from collections.abc import Iterator

TOKEN = re.compile(
    r"\\(?:begin|end)\s*\{[^{}]*\}|\\text\{[^{}]*\}|\\[A-Za-z]+|\\.|\d[\d.]*|[A-Za-z]+(?:'[A-Za-z]+)?|\s+|<=|>=|.",
    re.DOTALL,
)
_OPENING = frozenset(["(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"])
_CLOSING = frozenset([")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"])


def top_level(text: str) -> Iterator[re.Match[str]]:
    """Iterate over the tokens outside all brackets; \\text{…} is one token."""
    depth = 0
    for token in TOKEN.finditer(text):
        word = token[0]
        if word in _OPENING or word.startswith("\\begin"):
            depth += 1
        elif word in _CLOSING or word.startswith("\\end"):
            depth -= 1
        elif depth == 0:
            yield token


def split_at(text: str, tokens: list[re.Match[str]]) -> list[str]:
    """Split a text at tokens of it; the pieces are stripped."""
    starts = [0, *(token.end() for token in tokens)]
    ends = [*(token.start() for token in tokens), len(text)]
    return [text[start:end].strip() for start, end in zip(starts, ends, strict=True)]


_PAIRS = {"(": ")]", "[": ")]", r"\{": r"\}", "{": "}", r"\langle": r"\rangle", "]": "["}
_KINDS = {r"\{": "{}", "{": "{}", r"\langle": "<>"}


def in_brackets(text: str) -> tuple[str, str] | None:
    """Kind and content of the brackets that enclose a whole text; None if there are none."""
    tokens = [token for token in TOKEN.finditer(text) if not token[0].isspace()]
    if len(tokens) < 2 or tokens[0][0] not in _PAIRS:
        return None
    first, last = tokens[0][0], tokens[-1][0]
    if first == "]" or (first == "[" and last == "[") or (first == "(" and last == "["):
        return _french(text, first, last, tokens)
    closings = (_PAIRS[first],) if first[0] in "\\{" else tuple(_PAIRS[first])
    if last not in closings:
        return None
    depth = 0
    for token in tokens[:-1]:
        word = token[0]
        depth += (word in _OPENING or word.startswith("\\begin")) - (word in _CLOSING or word.startswith("\\end"))
        if depth == 0:
            return None
    inner = text[tokens[0].end() : tokens[-1].start()].strip()
    return _KINDS.get(first, first + last), inner


def _french(text: str, first: str, last: str, tokens: list[re.Match[str]]) -> tuple[str, str] | None:
    """An interval in French notation: ]0, 1[ is (0, 1)."""
    if len(tokens) < 4 or last not in "])[":
        return None
    inner = text[tokens[0].end() : tokens[-1].start()].strip()
    if any(bracket in inner for bracket in "[]") or inner.count(",") + inner.count(";") != 1:
        return None
    return ("(" if first in "](" else "[") + (")" if last in "[)" else "]"), inner
