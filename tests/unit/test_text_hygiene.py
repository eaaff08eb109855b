"""Text of others is safe to print and to store once it was cleaned."""

from __future__ import annotations

import json

import pytest

from megatron_fipo.system.text_hygiene import clean_text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("", ""),
        ("x = 5\n\ty", "x = 5\n\ty"),
        (
            "ü, 漢字, \u3000, 👩\u200d🔬, می\u200cخواهم, \U0001d53c",
            "ü, 漢字, \u3000, 👩\u200d🔬, می\u200cخواهم, \U0001d53c",
        ),
        ("\ud800", r"\ud800"),
        ("a\udfffb", r"a\udfffb"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("\x1b]52;c;aGk=\x07", r"\x1b]52;c;aGk=\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("over\rwritten\r\n", "over\\x0dwritten\\x0d\n"),
        ("nothing\x00", r"nothing\x00"),
        ("\x7f\x85", r"\x7f\x85"),
        ("abc\u202edcba\u2066", r"abc\u202edcba\u2066"),
        ("one\u2028two\u2029", r"one\u2028two\u2029"),
    ],
)
def test_what_becomes_of_text(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_every_character_is_safe_afterwards_and_cleaning_again_changes_nothing() -> None:
    everything = "".join(map(chr, range(0x110000)))
    with pytest.raises(UnicodeEncodeError):
        everything.encode()
    cleaned = clean_text(everything)
    cleaned.encode()
    assert cleaned.splitlines() == cleaned.split("\n")
    assert not any(ord(char) < 32 and char not in "\n\t" for char in cleaned)
    assert json.loads(json.dumps(cleaned, ensure_ascii=False).encode()) == cleaned
    assert clean_text(cleaned) == cleaned


def test_long_text_is_cut_whatever_its_characters_grow_to() -> None:
    assert clean_text("abc", max_characters=3) == "abc"
    assert clean_text("abcd", max_characters=3) == "abc…"
    assert clean_text("\x1b" * 10, max_characters=6) == r"\x1b\x…"
    assert clean_text("a" * 10_000_000, max_characters=5) == "aaaaa…"
