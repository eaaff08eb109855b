"""Text that somebody else wrote, made safe to print and to store: one function, applied once, where such text comes in.

A lone surrogate cannot be written as UTF-8, an escape sequence moves the reader's cursor or fills the clipboard, a
direction mark makes a line read as another, and the separators of lines that only some readers know tear a JSON line in
two. All of them become what Python's source would have for them, such as `\\x1b` and `\\ud800`: visible, and harmless.
"""

from __future__ import annotations

import re

_HARMFUL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control codes, with the carriage return; a new line and a tab are text
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # marks of direction
    "\u2028\u2029"  # separators of lines and paragraphs
    "\ud800-\udfff]"  # surrogates; a pair that stands for one character is one character in Python, not two
)


def clean_text(text: str, max_characters: int | None = None) -> str:
    r"""The text with its harmful characters escaped; new lines, tabs and whatever else is text stay as they are.

    Cleaning twice changes nothing. The result encodes as UTF-8, and `splitlines` splits it at "\n" alone.

    Args:
        text: the text of a model, a verifier, a server or a file.
        max_characters: a longer text is cut there, and ends in an ellipsis; None for no limit.
    """
    if max_characters is not None and len(text) > max_characters:
        # Cut before as well: escaping makes up to six characters of one, and what comes in may be huge.
        text = text[:max_characters] + "…"
    cleaned = _HARMFUL.sub(_escaped, text)
    if max_characters is not None and len(cleaned) > max_characters + 1:
        cleaned = cleaned[:max_characters] + "…"
    return cleaned


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
