"""What a model writes reaches the terminal as text, and never as an order to it."""

from __future__ import annotations

import io
from typing import Any

import pytest

from megatron_fipo.chat import TextPrinter


class ByteTokenizer:
    """A token for each byte, as byte-level tokenizers have them."""

    def decode(self, ids: list[int], skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return bytes(ids).decode(errors="replace")


def printed(text: str) -> str:
    """What the terminal gets of a text that comes byte by byte."""
    out = io.StringIO()
    tokenizer: Any = ByteTokenizer()
    printer = TextPrinter(tokenizer, out)
    for token_id in text.encode():
        printer.token(token_id)
    printer.end()
    return out.getvalue()


def test_text_is_printed_as_it_is() -> None:
    text = "a = 1\n\tb = ü, 漢字 👩\u200d🔬\n\nend"
    assert printed(text) == text + "\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]52;c;ZXZpbA==\x07done", r"\x1b]52;c;ZXZpbA==\x07done"),  # would fill the clipboard
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("\x9b31m\x9d0;title\x9c", r"\x9b31m\x9d0;title\x9c"),  # the same in one character, as 8-bit terminals take it
        ("safe\rover\x08written\x00", r"safe\x0dover\x08written\x00"),
        ("line\n\x1b[1A\x1b[2Kother", "line\n" + r"\x1b[1A\x1b[2Kother"),
        ("abc\u202edcba", r"abc\u202edcba"),
    ],
)
def test_control_codes_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert printed(text) == shown + "\n"
