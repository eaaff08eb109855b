r"""Finding the final answer in a response: what stands in the last \boxed{...}, after the last "Answer:" or "####".

Every search takes time linear in the text, whatever the text, and looks at its last MAX_SEARCHED_CHARACTERS only.
"""

from __future__ import annotations

import re

MAX_SEARCHED_CHARACTERS = 200_000
"""A response of 32k tokens has about 130,000 characters; no model puts its final answer further from its end."""

_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
# The next line is looked at, not consumed: it may hold a marker of its own.
_ANSWER_LINE = re.compile(
    r"(?:\banswer\b[*_]{0,2}\s{0,4}:|####)[*_]{0,2}[ \t]*([^\n]*)(?=(?:\n{1,8}[ \t]*([^\n]+))?)", re.IGNORECASE
)
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\.|[{}]", re.DOTALL)


def last_answer_tag(text: str) -> str | None:
    """Content of the last <answer>…</answer>, stripped; None if there is none."""
    opened_at, content = None, None
    for tag in _ANSWER_TAG.finditer(_end_of(text)):
        if not tag[1]:
            opened_at = tag.end() if opened_at is None else opened_at
        elif opened_at is not None:
            content = tag.string[opened_at : tag.start()]
            opened_at = None
    return content.strip() if content is not None else None


def last_boxed(text: str) -> tuple[int, str] | None:
    r"""Position and content of the last \boxed{...} whose braces balance; None if there is none.

    Of boxes within each other the outermost counts.
    """
    end = _end_of(text)
    if "\\boxed" not in end and "\\fbox" not in end:
        return None
    offset = len(text) - len(end)
    open_braces: list[re.Match[str]] = []
    open_boxes: list[int] = []  # how many braces are open around each open box
    last: tuple[int, int, int] | None = None
    for token in _BOX_OR_BRACE.finditer(end):
        if token[0] == "}":
            if not open_braces:
                continue
            opening = open_braces.pop()
            if open_boxes and open_boxes[-1] == len(open_braces):
                open_boxes.pop()
                last = (opening.start(), opening.end(), token.start())
        elif token[0].endswith("{") and token[0] != r"\{":
            if token[0] != "{":
                open_boxes.append(len(open_braces))
            open_braces.append(token)
    return (offset + last[0], end[last[1] : last[2]].strip()) if last else None


def last_answer_line(text: str) -> tuple[int, str] | None:
    """Position and content of the last "Answer:" or "####": the rest of its line, or the next line that is not empty.

    "Answer:" counts in any case, also as "Final Answer:" and in Markdown's bold. None if there is none.
    """
    end = _end_of(text)
    last = None
    for last in _ANSWER_LINE.finditer(end):  # noqa: B007 - the last match is what is wanted
        pass
    if last is None:
        return None
    same_line, next_line = last.groups(default="")
    return len(text) - len(end) + last.start(), _undecorated(same_line) or _undecorated(next_line)


def last_marked_answer(text: str) -> str | None:
    r"""Answer at whichever marker comes last in the text: \boxed{...}, "Answer:" or "####"; None without one."""
    found = [candidate for candidate in (last_boxed(text), last_answer_line(text)) if candidate is not None]
    return max(found)[1] if found else None


def last_line(text: str) -> str:
    """Last line that is not empty, stripped; empty for an empty text."""
    stripped = _end_of(text.rstrip())
    return stripped.splitlines()[-1].strip() if stripped else ""


def _end_of(text: str) -> str:
    return text[-MAX_SEARCHED_CHARACTERS:]


def _undecorated(answer: str) -> str:
    """Without the bold marks and the full stop that sentences end with."""
    answer = answer.strip().strip("*").strip()
    return answer[:-1].rstrip() if answer.endswith(".") and not answer.endswith("..") else answer
