r"""Reads choices: "C", "(C)", "C)", "Option C", possibly with the choice's content: "\textbf{(C)}\ 42", "C: a text"."""

from __future__ import annotations

import re

_LEAD = r"(?:(?:option|choice|answer)s?\s+)?"
_LETTER_ALONE = re.compile(rf"(?i:{_LEAD})(?:[(\[](?P<bracketed>[A-Za-z])[)\]][.:]?|(?P<bare>[A-Za-z])(?:[).:]|))")
_NAMED = re.compile(r"(?i:(?:option|choice|answer)s?\s)")
_LETTER_WITH_CONTENT = re.compile(
    rf"(?:(?i:{_LEAD})\(?(?P<closed>[A-J])\)[.:]?\s*|(?i:{_LEAD})\((?P<small>[a-j])\)[.:]?\s+"
    rf"|(?i:{_LEAD})(?P<colon>[A-J])[.:]\s+|(?i:(?:option|choice|answer)\s+)(?P<named>[A-J])[,:.]?\s+)(?P<content>\S.*)",
    re.DOTALL,
)
_OPERATOR = re.compile(
    r"[+*/^=<>_!)|,;]|-(?!\s*[\d.\\($])|\\(?:cdot|times|div|cup|cap|in|le|ge|ne|to)(?![A-Za-z])|(?:and|or)\b"
)


def split_choice(text: str) -> tuple[str, str, bool] | None:
    """Read the choice that a cleaned text names.

    Returns:
        Its letter, its content ("" without one), and whether the letter cannot be a variable; None if the text names no
        choice.
    """
    plain = re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r"\1 ", text, count=1).strip() if "\\text" in text[:6] else text
    alone = _LETTER_ALONE.fullmatch(plain)
    if alone is not None:
        return (alone["bracketed"] or alone["bare"]).upper(), "", plain != (alone["bare"] or "") or text != plain
    match = _LETTER_WITH_CONTENT.fullmatch(plain)
    if match is None or _OPERATOR.match(match["content"]):
        return None
    letter = match["closed"] or match["small"] or match["colon"] or match["named"]
    content = match["content"].strip()
    if match["colon"] and len(content) == 1 and content.isalpha():
        return None  # the ratio A : B
    if match["closed"] and "\\text" not in text and content[0] in "([" and "(" in text[:1]:
        return None  # the product (A)(B)
    return letter.upper(), content, True
