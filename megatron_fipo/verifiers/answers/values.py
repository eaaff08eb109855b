"""Values of parsed answers: a quantity's exact value, the value of a name, the difference of a relation's sides."""

from __future__ import annotations

import re
from typing import Any

import sympy

from megatron_fipo.verifiers.answers import algebra
from megatron_fipo.verifiers.answers.reader import read
from megatron_fipo.verifiers.answers.readings import Member, Quantity, Reading, Relation


def exact_value(quantity: Quantity) -> Any:
    """The sympy object of a quantity's value; None if its expression is opaque."""
    return algebra.rational(quantity.value) if quantity.value is not None else algebra.parse(quantity.expression)


def value_of(relation: Relation) -> Reading | None:
    """The value that a relation states: 5 for "x = 5", "x = 2 + 3 = 5" and "2 + 3 = 5"; None if it states none.

    All members without variables must be equal, the first member must be a name or have no variables, and a rounded
    decimal may follow its exact value.
    """
    members, operators = list(relation.members), list(relation.operators)
    if len(members) > 2 and operators[-1] == "~" and _rounds(members[-1], members[-2]):
        members, operators = members[:-1], operators[:-1]
    if len(members) == 2 and operators == ["~"] and not members[0].name and _rounds(members[1], members[0]):
        return read(members[0].text)
    if operators == ["in"] and members[0].name:
        return read(members[1].text)
    last = read(members[-1].text)
    if operators == ["=="] and members[0].name and isinstance(last, Quantity) and last.unit.is_modulus:
        return last  # "x \\equiv 7 \\pmod{10}"
    if set(operators) != {"="}:
        return None
    numbers = [number for number in (_number(member) for member in members if not member.name) if number is not None]
    if not members[0].name and _number(members[0]) is None:
        return None
    if any(not algebra.equal(number, numbers[-1]) for number in numbers):
        return None
    return last


def _number(member: Member) -> Any:
    """Value of a member without variables; None for any other member."""
    reading = read(member.text)
    if not isinstance(reading, Quantity):
        return None
    value = exact_value(reading)
    return value if algebra.is_number(value) else None


def _rounds(rounded: Member, exact: Member) -> bool:
    """Whether a decimal is an exact value, rounded or truncated to the decimal's number of places."""
    reading, value = read(rounded.text), _number(exact)
    if not isinstance(reading, Quantity) or reading.value is None or value is None or not value.is_real:
        return False
    places = len(re.sub(r"[^\d.]", "", reading.expression).partition(".")[2])
    size, written = sympy.N(abs(value), 50), algebra.rational(abs(reading.value))
    step = sympy.Rational(1, 10**places)
    if bool(value > 0) != (reading.value > 0):
        return False
    return bool(abs(size - written) <= step / 2) or bool(0 <= size - written < step)


def difference(relation: Relation) -> Any:
    """The first member minus the second; None if a member is no expression."""
    sides = [algebra.parse(member.text) for member in relation.members]
    return sides[0] - sides[1] if all(isinstance(side, sympy.Expr) for side in sides) else None
