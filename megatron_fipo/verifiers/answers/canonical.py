"""Gives equal answers one text, so that a majority vote (cons@k) counts values and not spellings."""

from __future__ import annotations

import hashlib

import sympy

from megatron_fipo.verifiers.answers import algebra
from megatron_fipo.verifiers.answers.number_sets import as_set
from megatron_fipo.verifiers.answers.readings import (
    Choice,
    ClockTime,
    Dots,
    Numeral,
    Quantity,
    Ratio,
    Reading,
    Relation,
    Several,
    Union,
    Words,
)
from megatron_fipo.verifiers.answers.values import difference, exact_value, value_of
from megatron_fipo.verifiers.math_text import without_layout

MAX_CHARACTERS = 200
"""Longest canonical text; the end of a longer one is replaced by a digest."""

_MAX_BITS = 600
"""Fractions with more bits in numerator or denominator keep the answer's spelling."""

_VOTE_DIGITS = 40


def canonical(reading: Reading, text: str) -> str:
    """The canonical text of an answer: a number as a fraction, a name's value without the name, sorted sets.

    Units are left out; `mathematics` keeps an answer that is wrong only by its unit from sharing the reference's text.

    Args:
        reading: the parsed answer.
        text: the cleaned answer, used if the reading has no text of its own.
    """
    return bounded(_text(reading) or without_layout(text))


def bounded(text: str) -> str:
    """Shorten a text to at most MAX_CHARACTERS, with a digest so that different texts stay different."""
    if len(text) <= MAX_CHARACTERS:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:16]
    return f"{text[: MAX_CHARACTERS - 20]}… {digest}"


def _text(reading: Reading) -> str:
    match reading:
        case Quantity():
            return _quantity_text(reading)
        case Words():
            return reading.text
        case Choice():
            return reading.letter if len(reading.text) > 1 or reading.text in "ABCDEFGHIJ" else reading.text
        case ClockTime():
            return _time_text(reading)
        case Numeral():
            return f"{reading.digits}_{reading.base}"
        case Ratio():
            return _ratio_text(reading)
        case Dots():
            return "..."
        case Several():
            return _several_text(reading)
        case Union():
            return " U ".join(sorted(map(_text, reading.parts)))
        case Relation():
            return _relation_text(reading)


def _quantity_text(quantity: Quantity) -> str:
    value = exact_value(quantity)
    written = without_layout(quantity.expression)
    if isinstance(value, sympy.MatrixBase):
        members = [_value_text(member, "") for member in value.flat()]
        return f"{value.rows}x{value.cols}: {', '.join(members)}" if all(members) else written
    return _value_text(value, written)


def _value_text(value: object, written: str) -> str:
    """Text of a sympy value; `written` for one that has no text or a long one."""
    if not isinstance(value, sympy.Expr) or value is sympy.nan:
        return written
    if value.is_Rational:
        bits = max(int(value.p).bit_length(), int(value.q).bit_length())
        return str(value) if bits <= _MAX_BITS else written
    if not value.free_symbols and value.is_finite:
        number = value.evalf(_VOTE_DIGITS)
        if all(part.is_Float or part.is_Rational for part in number.as_real_imag()):
            return str(number)
    return str(algebra.expanded(value)).replace(" ", "")


def _time_text(time: ClockTime) -> str:
    second = f":{time.second:02d}" if time.second else ""
    return f"{time.hour}:{time.minute:02d}{second}" + (f" {time.meridiem}" if time.meridiem else "")


def _ratio_text(ratio: Ratio) -> str:
    values = [exact_value(part) if isinstance(part, Quantity) else None for part in ratio.parts]
    if all(value is not None and value.is_Rational for value in values) and values[0]:
        return ":".join(["1", *(str(value / values[0]) for value in values[1:])])
    return ":".join(_text(part) for part in ratio.parts)


def _several_text(several: Several) -> str:
    members = [_text(item) for item in several.items]
    if len(members) == 1:
        return members[0]
    if not several.in_order and several.brackets in ("", "{}"):
        return "{" + ", ".join(sorted(members)) + "}"
    opening, closing = (several.brackets[:1] or "", several.brackets[1:] or "")
    return opening + (" -> " if several.joiner == "->" else ", ").join(members) + closing


def _relation_text(relation: Relation) -> str:
    value = value_of(relation)
    if value is not None:
        return _text(value)
    if relation.operators == ("=",):
        return _equation_text(relation) or _relation_as_written(relation)
    return _set_text(as_set(relation)) or _relation_as_written(relation)


def _set_text(numbers: object) -> str:
    """An interval or a union of intervals in brackets; empty for any other set."""
    parts = numbers.args if isinstance(numbers, sympy.Union) else (numbers,)
    texts = []
    for part in parts:
        if not isinstance(part, sympy.Interval):
            return ""
        opening, closing = "(" if part.left_open else "[", ")" if part.right_open else "]"
        texts.append(f"{opening}{_value_text(part.start, '')}, {_value_text(part.end, '')}{closing}")
    return " U ".join(sorted(texts))


def _equation_text(relation: Relation) -> str:
    """A polynomial equation with leading coefficient 1 and right side 0; empty for any other equation."""
    both_sides = difference(relation)
    if both_sides is None or not both_sides.free_symbols:
        return ""
    numerator = sympy.fraction(sympy.together(both_sides))[0]
    try:
        polynomial = sympy.Poly(numerator, *sorted(numerator.free_symbols, key=str), domain="QQ")
    except (sympy.PolynomialError, sympy.CoercionFailed):
        return ""
    return f"{polynomial.monic().as_expr()} = 0"


def _relation_as_written(relation: Relation) -> str:
    pieces = [without_layout(relation.members[0].text)]
    for operator, member in zip(relation.operators, relation.members[1:], strict=True):
        pieces += [operator, without_layout(member.text)]
    return " ".join(piece for piece in pieces if piece)
