r"""Answers as text: one spelling for what LaTeX and Unicode spell in many ways; what is too large to compute."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

MAX_DEPTH = 24
"""Deepest nesting of brackets in an answer."""

MAX_EXPONENT = 5000
"""Largest number allowed as an exponent, before a factorial sign or in a binomial."""

MAX_POWER_OF_POWERS = 200_000
"""Largest product of a power's exponent with those of the powers in its brackets, as in (2^{100})^{200}."""

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "°": r"^\circ", "π": r"\pi ", "∞": r"\infty "}
)
_SUBSTITUTIONS = [
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|bigl?|bigr|Bigl?|Bigr)(?![a-zA-Z])"), ""),
    (re.compile(r"(?<=\d)\\!,\\!(?=\d)|(?<=\d)\{,\}(?=\d)"), ","),
    (re.compile(r"(?<=\d)\\[,;:](?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[,;:! ]|~|\\q?quad(?![a-zA-Z])"), " "),
    (re.compile(r"\\varnothing|∅"), r"\\emptyset"),
    (re.compile(r"√\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])infinity\b"), r"\\infty"),
    (re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\\a-zA-Z])(pi|sin|cos|tan|log|ln|exp)(?![a-zA-Z])"), r"\\\1"),
    (re.compile(r"\s+"), " "),
]
_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|textrm|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ '-][A-Za-z]+)*")
_LOOSE_SPACE = re.compile(r"(?<!\d) | (?!\d)")
_LETTER_IN_BRACKETS = re.compile(r"\(([A-Za-z])\)\.?")
_EXPONENT = re.compile(r"([)}]?)\s*\^[\s{(]*[+-]?\s*(\d+)")
_POWER_IN_EXPONENT = re.compile(r"\^[\s{(]*(?=(\d+)\s*\^[\s{(]*(\d+))")
_FACTORIAL_OR_BINOMIAL = re.compile(r"(\d+)\s*!|\\d?binom\s*\{\s*(\d+)")


def cleaned(answer: str) -> str:
    """An answer without what only changes its look: mathematics signs, spaces, sizes of brackets and fractions."""
    text = answer.translate(_CHARACTERS).strip()
    for pattern, replacement in _SUBSTITUTIONS:
        text = pattern.sub(replacement, text)
    text = text.strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    stripped = True
    while stripped:
        stripped = False
        wrapped = _TEXT_COMMAND.fullmatch(text)
        if wrapped is not None:
            text, stripped = wrapped[1].strip(), True
        for left, right in _WRAPPERS:
            inner = text[len(left) : -len(right)]
            if (
                len(text) > len(left) + len(right)
                and text.startswith(left)
                and text.endswith(right)
                and left not in inner
            ):
                text, stripped = inner.strip(), True
    return text


def without_layout(text: str) -> str:
    r"""A cleaned answer without \text{...} and without spaces, save those between digits.

    Equal ones are the same answer, whatever kind it is; "2 1/2" is not "21/2".
    """
    return _LOOSE_SPACE.sub("", _TEXT_COMMAND.sub(r"\1", text))


def as_words(text: str) -> str | None:
    r"""A cleaned answer in words, in lower case: "(B)", "\text{Tuesday}", "yes"; None if it is no such answer."""
    plain = _TEXT_COMMAND.sub(r"\1", text).strip()
    letter = _LETTER_IN_BRACKETS.fullmatch(plain)
    if letter is not None:
        return letter[1].lower()
    if _WORDS.fullmatch(plain) or (len(plain) == 1 and plain.isalpha()):
        return plain.lower()
    return None


def is_computable(text: str) -> bool:
    """Whether computer algebra may be asked about an answer: no towers of powers, nothing huge, not deeply nested."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return False
    powers = text.replace("**", "^")
    arguments = _capped(left or right for left, right in _FACTORIAL_OR_BINOMIAL.findall(powers))
    found = _EXPONENT.findall(powers)
    exponents = _capped(digits for bracket, digits in found if not bracket)
    exponents_of_brackets = _capped(digits for bracket, digits in found if bracket)
    towers = [base ** min(exponent, 99) for base, exponent in map(_capped, _POWER_IN_EXPONENT.findall(powers))]
    if any(number > MAX_EXPONENT for number in (*arguments, *exponents, *exponents_of_brackets, *towers)):
        return False
    return math.prod(exponents_of_brackets) * max(exponents, default=1) <= MAX_POWER_OF_POWERS


def _capped(numbers: Iterable[str]) -> list[int]:
    """Numbers as integers; what has more than six digits counts as a million."""
    return [int(digits) if len(digits) <= 6 else 10**6 for digits in numbers]
