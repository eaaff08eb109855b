r"""Reads numerals with a base: 1010_2, 413_{5}, BAD_{16}, 11_{\text{two}}, 1010 (base 2). Nothing is converted."""

from __future__ import annotations

import re

from megatron_fipo.verifiers.answers.readings import Numeral

_NAMES = {
    name: base
    for base, names in {
        2: "two binary", 3: "three ternary", 4: "four", 5: "five", 6: "six", 7: "seven", 8: "eight octal", 9: "nine",
        10: "ten decimal", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen",
        16: "sixteen hexadecimal hex", 20: "twenty",
    }.items()
    for name in names.split()
}  # fmt: skip
_DIGITS = r"(?:\\text\s*\{)?\(?\s*(?P<digits>[0-9][0-9A-Za-z ,]*?|[A-Z]*[0-9][0-9A-Z]*|[A-Z]{2,})\s*\)?\}?"
_SUBSCRIPT = re.compile(
    _DIGITS + r"\s*_\s*(?:(?P<digit>\d+)|\{\s*(?:\\text\{\s*base\s*\}\s*|\\text\{)?\s*(?:base\s*)?"
    r"\(?(?P<base>\d+|[a-z]+)\)?\s*\}?\s*\})"
)
_IN_WORDS = re.compile(
    _DIGITS + r"\s*(?:\\text\{)?\s*\(?(?:in )?base[ -](?:\\text\{)?(?P<base>\d+|[a-z]+)\s*\}?\)?\s*\}?"
)
_LARGEST_BASE = 60


def read_numeral(text: str) -> Numeral | None:
    """Read a cleaned text that is a numeral with a base; None if it is anything else."""
    if "_" not in text and "base" not in text:
        return None
    match = _SUBSCRIPT.fullmatch(text) or _IN_WORDS.fullmatch(text)
    if match is None:
        return None
    named = match["base"] or match["digit"]
    base = _NAMES.get(named) or (int(named) if named.isdigit() and len(named) <= 2 else 0)
    if not 2 <= base <= _LARGEST_BASE:
        return None
    return Numeral(same_digits(match["digits"]), base)


def same_digits(digits: str) -> str:
    """Digits in one spelling: upper case, no spaces or commas, no leading zeros."""
    return re.sub(r"[\s,]", "", digits).upper().lstrip("0") or "0"
