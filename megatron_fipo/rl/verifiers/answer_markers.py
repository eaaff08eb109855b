r"""Finding the final answer in a response: what stands in the last \boxed{...}, after the last "Answer:" or "####"."""

from __future__ import annotations

import re

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
# The next line is looked at, not consumed: it may hold a marker of its own.
_ANSWER_LINE = re.compile(
    r"(?:\banswer\b[*_]{0,2}\s*:|####)[*_]{0,2}[ \t]*([^\n]*)(?=(?:\n+[ \t]*([^\n]+))?)", re.IGNORECASE
)
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")


def last_answer_tag(text: str) -> str | None:
    """Content of the last <answer>…</answer>, stripped; None if there is none."""
    contents = _ANSWER_TAG.findall(text)
    return contents[-1].strip() if contents else None


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Position and content of the last \boxed{...} whose braces balance; None if there is none."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth, position = 1, match.end()
        while position < len(text) and depth:
            escaped = text[position - 1] == "\\"
            depth += 0 if escaped else {"{": 1, "}": -1}.get(text[position], 0)
            position += 1
        if not depth:
            return match.start(), text[match.end() : position - 1].strip()
    return None


def last_answer_line(text: str) -> tuple[int, str] | None:
    """Position and content of the last "Answer:" or "####": the rest of its line, or the next line that is not empty.

    "Answer:" counts in any case, also as "Final Answer:" and in Markdown's bold. None if there is none.
    """
    matches = list(_ANSWER_LINE.finditer(text))
    if not matches:
        return None
    same_line, next_line = matches[-1].groups(default="")
    return matches[-1].start(), _undecorated(same_line) or _undecorated(next_line)


def last_marked_answer(text: str) -> str | None:
    r"""Answer at whichever marker comes last in the text: \boxed{...}, "Answer:" or "####"; None without one."""
    found = [candidate for candidate in (last_boxed(text), last_answer_line(text)) if candidate is not None]
    return max(found)[1] if found else None


def last_line(text: str) -> str:
    """Last line that is not empty, stripped; empty for an empty text."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _undecorated(answer: str) -> str:
    """Without the bold marks and the full stop that sentences end with."""
    answer = answer.strip().strip("*").strip()
    return answer[:-1].rstrip() if answer.endswith(".") and not answer.endswith("..") else answer
