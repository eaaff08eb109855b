"""The value of an arithmetic expression of numbers, + - * / ^ and brackets."""

from __future__ import annotations

import math
import re

_MAX_CHARACTERS = 80
_MAX_DEPTH = 10
_TOKEN = re.compile(r"[0-9]{1,15}(?:\.[0-9]{1,15})?|[-+*/^()]")


class _NoValueError(ValueError):
    """The text is no expression, or has no value that is finite."""


def value_of(text: str) -> float | None:
    """The value; None if the text is no such expression, is long, or has none that is finite."""
    text = text.replace(",", "")
    tokens = _TOKEN.findall(text)
    if not tokens or len(text) > _MAX_CHARACTERS or "".join(tokens) != text:
        return None
    reader = _Reader(tokens)
    try:
        value = reader.sum(0)
        return value if not reader.rest and math.isfinite(value) else None
    except (_NoValueError, ZeroDivisionError, OverflowError):
        return None


class _Reader:
    def __init__(self, tokens: list[str]) -> None:
        self.rest = tokens[::-1]

    def _next(self, wanted: str) -> str | None:
        return self.rest.pop() if self.rest and self.rest[-1] in wanted else None

    def sum(self, depth: int) -> float:
        value = self.product(depth)
        while operator := self._next("+-"):
            term = self.product(depth)
            value = value + term if operator == "+" else value - term
        return value

    def product(self, depth: int) -> float:
        value = self.power(depth)
        while operator := self._next("*/"):
            factor = self.power(depth)
            value = value * factor if operator == "*" else value / factor
        return value

    def power(self, depth: int) -> float:
        base = self.atom(depth)
        if not self._next("^"):
            return base
        exponent = self.power(depth + 1) if depth < _MAX_DEPTH else math.nan
        if abs(exponent) > 64 or (base < 0 and exponent != int(exponent)):
            raise _NoValueError
        return float(base**exponent)

    def atom(self, depth: int) -> float:
        if not self.rest or depth > _MAX_DEPTH:
            raise _NoValueError
        token = self.rest.pop()
        if token == "-":
            return -self.power(depth + 1)
        if token == "(":
            value = self.sum(depth + 1)
            if not self._next(")"):
                raise _NoValueError
            return value
        if token in "+*/^)":
            raise _NoValueError
        return float(token)
