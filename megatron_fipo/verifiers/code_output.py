"""Whether a program's output, or what its function returns, is what was expected.

Outputs are compared line by line, without the white space around the whole output and at the end of each line. Two
lines are equal if their words are, with any amount of white space between them; a line without a letter or a digit,
such as a row of a drawing, must be the same text. Two words are equal if they are the same text or the same decimal
number: 2.0 is 2, and 1e-3 is 0.001, exactly. Numbers with leading zeros are texts (0101 is not 101). With a tolerance
t, which problems with floating-point answers state, a number a equals the expected b if |a − b| ≤ t · max(1, |b|).

Results are compared by Python's ==, with tuples as lists: 1 is 1.0, and True is 1.
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(r"[+-]?(0|[1-9]\d*|(?=\.))(\.\d*)?(e[+-]?\d{1,6})?", re.IGNORECASE | re.ASCII)
_WORD_CHARACTER = re.compile(r"\w")
_LARGEST_EXPONENT = 400
"""Numbers of 10^401 and more are compared without the tolerance: no floating-point answer is so large."""


def same_output(actual: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether a program's output is the expected one."""
    actual_lines, expected_lines = _lines(actual), _lines(expected)
    if len(actual_lines) != len(expected_lines):
        return False
    return all(a == b or _same_words(a, b, tolerance) for a, b in zip(actual_lines, expected_lines, strict=True))


def _lines(output: str) -> list[str]:
    return [line.rstrip() for line in output.strip().splitlines()]


def _same_words(actual: str, expected: str, tolerance: float) -> bool:
    if not _WORD_CHARACTER.search(expected):
        return False
    actual_words, expected_words = actual.split(), expected.split()
    return len(actual_words) == len(expected_words) and all(
        a == b or _same_numbers(a, b, tolerance) for a, b in zip(actual_words, expected_words, strict=True)
    )


def _same_numbers(actual: str, expected: str, tolerance: float) -> bool:
    if not (_is_number(actual) and _is_number(expected)):
        return False
    a, b = Decimal(actual), Decimal(expected)
    if a == b:
        return True
    if not tolerance or max(a.adjusted(), b.adjusted()) > _LARGEST_EXPONENT:
        return False
    small = Decimal(f"1e-{_LARGEST_EXPONENT}")
    a, b = (number if abs(number) > small else Decimal(0) for number in (a, b))
    return _close(a, b, tolerance)


def _is_number(word: str) -> bool:
    return _NUMBER.fullmatch(word) is not None and any(character.isdigit() for character in word)


def _close(a: Any, b: Any, tolerance: float) -> bool:
    size = max(Fraction(1), abs(Fraction(b)))
    return abs(Fraction(a) - Fraction(b)) <= Fraction(tolerance) * size


def same_result(actual: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether a function's result, made of JSON's types, is the expected one."""
    if isinstance(actual, list) and isinstance(expected, list):
        return len(actual) == len(expected) and all(
            same_result(a, b, tolerance) for a, b in zip(actual, expected, strict=True)
        )
    if isinstance(actual, dict) and isinstance(expected, dict):
        return actual.keys() == expected.keys() and all(
            same_result(value, expected[key], tolerance) for key, value in actual.items()
        )
    if actual == expected:
        return True
    numbers = isinstance(actual, int | float) and isinstance(expected, int | float)
    finite = numbers and abs(actual) < float("inf") and abs(expected) < float("inf")
    return bool(tolerance) and finite and _close(actual, expected, tolerance)
