r"""Find the final answer of a response: in the last \boxed{...}, or after the last "Answer:" or "####".

Every search takes time linear in the text and looks at the last MAX_SEARCHED_CHARACTERS characters only.
"""

from __future__ import annotations

import re

MAX_SEARCHED_CHARACTERS = 200_000
"""A response of 32k tokens has about 130,000 characters; no model puts its final answer further from its end."""

MAX_CONTINUED_LINES = 60
"""A matrix or box may extend over this many lines."""

_STARS = re.compile(r"\*+")
_ANSWER_TAG = re.compile(r"<(/?)answer>", re.IGNORECASE)
# Not \b, which takes an underscore for a letter: "__Answer__:" is bold.
_ANSWER_COLON = r"(?<![A-Za-z0-9])answer[*_]{0,2}\s{0,4}[:：]"
_ANSWER_MARKER = re.compile(rf"(?:{_ANSWER_COLON}|#{{4,}})[*_]{{0,2}}", re.IGNORECASE)
_ANSWER_COLON_MARKER = re.compile(rf"{_ANSWER_COLON}[*_]{{0,2}}", re.IGNORECASE)
_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)\s{0,4}\{|\\.|[{}]", re.DOTALL)
_TAG = re.compile(r"</?(?:answer|think)>", re.IGNORECASE)
_END_OF_TURN = re.compile(
    r"<\|(?:im_end|endoftext|end_of_text|eot_id|eom_id|end|eos)\|>|<｜end[^｜<>]{1,40}｜>|</s>|<(?:eos|end_of_turn)>"
)
"""End-of-turn tokens, which some tokenizers leave in the decoded text."""
_BULLET = re.compile(r"(?:[-*+•]|\d{1,2}[.)])[ \t]+(?=\S)")
_BLOCKS = (
    (re.compile(r"<answer>", re.IGNORECASE), re.compile(r"</answer>", re.IGNORECASE)),
    (re.compile(r"```[a-z]{0,8}(?=\s|$)"), re.compile(r"```")),
    (re.compile(r"\$\$"), re.compile(r"\$\$")),
    (re.compile(r"\\\["), re.compile(r"(?<!\\)\\\]")),
    (re.compile(r"\\\("), re.compile(r"(?<!\\)\\\)")),
    (re.compile(r"\$(?=\s*\n)"), re.compile(r"\$")),
)
"""Delimiters around an answer of several lines: (opening, closing)."""


_MINERVA_FRAME = re.compile(r"The final answer is (.{1,1000}?)\. I hope it is correct", re.IGNORECASE | re.DOTALL)
"""The form of an answer in Minerva's few-shot prompt (arXiv 2206.14858), which many evaluations use."""


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

    Where boxes are nested, the outermost counts.
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


def last_answer_line(text: str, *, number_signs: bool = True) -> tuple[int, str] | None:
    """Position of the last "Answer:" or "####", and the rest of its line or the next line that is not empty.

    "Answer:" counts in upper or lower case, also as "Final Answer:", in Markdown's bold and with a full-width colon. A
    content that opens a display, a code block or <answer> extends to its end; the lines of a list are joined by commas.
    None if there is no marker.

    Args:
        text: the response.
        number_signs: whether "####" is a marker.
    """
    end = _end_of(text)
    last = None
    for last in (_ANSWER_MARKER if number_signs else _ANSWER_COLON_MARKER).finditer(end):  # noqa: B007 - the last match is what is wanted
        pass
    if last is None:
        return None
    content = _content(end[last.end() :])
    framed = _MINERVA_FRAME.fullmatch(content)
    return len(text) - len(end) + last.start(), framed[1] if framed else content


def last_marked_answer(text: str) -> str | None:
    r"""The answer at the last marker of any kind: \boxed{...}, "Answer:" or "####"; None if there is no marker."""
    found = [candidate for candidate in (last_boxed(text), last_answer_line(text)) if candidate is not None]
    return max(found)[1] if found else None


def last_line(text: str) -> str:
    """The last line that is not empty, stripped; "" if there is none."""
    stripped = _end_of(text.rstrip())
    return stripped.splitlines()[-1].strip() if stripped else ""


def _end_of(text: str) -> str:
    return text[-MAX_SEARCHED_CHARACTERS:]


def _content(behind: str) -> str:
    """The answer at the beginning of what follows a marker."""
    first_line, _, rest = behind.partition("\n")
    on_next_line = not _undecorated(first_line)
    start = rest.lstrip() if on_next_line and not _opens(first_line) else behind.lstrip(" \t")
    for opening, closing in _BLOCKS:
        opened = opening.match(start)
        closed = closing.search(start, opened.end()) if opened else None
        if opened and closed:
            line_end = start.find("\n", closed.end())
            block = start[opened.end() : closed.start()] + start[closed.end() : line_end if line_end >= 0 else None]
            inner = " ".join(block.split())
            return _undecorated(_content(inner) if _opens(inner) else inner)
    lines = start.split("\n")
    bulleted = []
    for line in lines if on_next_line else ():
        bullet = _BULLET.match(line.strip())
        if bullet is None:
            break
        bulleted.append(_undecorated(line.strip()[bullet.end() :]))
    return ", ".join(bulleted) if bulleted else _undecorated(_continued(lines))


def _continued(lines: list[str]) -> str:
    """The first line; where it opens a matrix or a box, joined with the following lines until that is closed."""
    text = lines[0]
    for line in lines[1:MAX_CONTINUED_LINES]:
        open_box = "\\boxed{" in text and text.count("{") > text.count("}")
        if not open_box and text.count("\\begin{") <= text.count("\\end{"):
            return text
        text = f"{text} {line.strip()}"
    return text


def _opens(text: str) -> bool:
    return any(opening.match(text.lstrip()) for opening, _ in _BLOCKS)


def _undecorated(answer: str) -> str:
    """Remove tags, everything after an end-of-turn token, and the bold marks and full stop around the answer."""
    answer = _TAG.sub(" ", _END_OF_TURN.split(answer, maxsplit=1)[0]).strip()
    before = None
    while answer != before:
        before = answer
        answer = answer.strip()
        runs = _STARS.findall(answer)
        if len(runs) % 2 or (
            answer.startswith("*") and answer.endswith("*")
        ):  # "**73** apples" keeps both of its pairs
            answer = answer.strip("*").strip()
        if answer.endswith("。") or (answer.endswith(".") and not answer.endswith("..")):
            answer = answer[:-1].rstrip()
    return answer
