"""Converts parsed answers into sets of numbers: intervals, unions and inequalities may describe the same set."""

from __future__ import annotations

import re
from typing import Any

import sympy

from megatron_fipo.verifiers.answers import algebra
from megatron_fipo.verifiers.answers.reader import read
from megatron_fipo.verifiers.answers.readings import Quantity, Reading, Relation, Several, Union
from megatron_fipo.verifiers.answers.values import exact_value

_ABSOLUTE_VALUE = re.compile(r"(?:\||\\[lr]?vert)\s*[A-Za-z]\s*(?:\||\\[lr]?vert)")

TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
"""Each inequality's sign, read from right to left."""


def as_set(reading: Reading) -> Any:
    """The sympy set of the values that an answer allows for its variable; None if it is no set of numbers."""
    if isinstance(reading, Union):
        parts = [as_set(part) for part in reading.parts]
        return None if None in parts else sympy.Union(*parts)
    if isinstance(reading, Relation):
        return _set_of_relation(reading)
    if isinstance(reading, Quantity):
        value = exact_value(reading)
        return value if isinstance(value, sympy.Set) else None
    if not isinstance(reading, Several):
        return None
    if reading.brackets in ("()", "[]", "[)", "(]"):
        ends = [_real(item) for item in reading.items]
        if len(ends) != 2 or None in ends:
            return None
        ascending = sympy.Lt(*ends)
        return (
            sympy.Interval(*ends, reading.brackets[0] == "(", reading.brackets[1] == ")")
            if ascending is sympy.true
            else None
        )
    if reading.brackets == "{}":
        members = [_real(item) for item in reading.items]
        return None if None in members else sympy.FiniteSet(*members)
    return None if reading.brackets else _set_of_list(reading)


def _set_of_list(reading: Several) -> Any:
    """The set of a list such as "x < 1 or x > 2", "x > 1 and x < 2" or "(-oo, 1) or (2, oo)"."""
    if reading.joiner == "+-":
        values = [_real(item) for item in reading.items]
        return None if None in values else sympy.FiniteSet(*values)
    relations = all(isinstance(item, Relation) for item in reading.items)
    if (relations and len({name for item in reading.items for name in names_of(item)}) == 1) or reading.joiner == "or":
        parts = [as_set(item) for item in reading.items if isinstance(item, (Relation, Union, Several))]
        if None in parts or len(parts) < len(reading.items):
            return None
        equations = all(isinstance(item, Relation) and set(item.operators) == {"="} for item in reading.items)
        together = reading.joiner == "or" or (reading.joiner == "," and equations)
        return sympy.Union(*parts) if together else sympy.Intersection(*parts)
    return None


def between_ends(relation: Relation) -> Several | None:
    """The interval of a relation such as "a < x <= b", whose ends may be any expressions; None for other relations."""
    if len(relation.members) != 3 or not relation.members[1].name:
        return None
    members, operators = relation.members, relation.operators
    if set(operators) <= {">", ">="}:
        members, operators = members[::-1], tuple(TURNED[operator] for operator in operators[::-1])
    if not set(operators) <= {"<", "<="}:
        return None
    brackets = ("[" if operators[0] == "<=" else "(") + ("]" if operators[1] == "<=" else ")")
    return Several((read(members[0].text), read(members[2].text)), brackets)


def names_of(reading: Reading) -> list[str]:
    return [member.name for member in reading.members if member.name] if isinstance(reading, Relation) else []


def _real(reading: Reading) -> Any:
    value = exact_value(reading) if isinstance(reading, Quantity) and not reading.percent and not reading.unit else None
    return value if value is not None and algebra.is_number(value) and value.is_extended_real else None


def _set_of_relation(relation: Relation) -> Any:
    """The values of the only variable of a relation: "0 < x < 3", "x \\in [1, 2]", "x = 1", "x \\ne 2"."""
    names = [member.name for member in relation.members if member.name]
    if len(relation.members) == 2 and not names:
        return _set_of_absolute_value(relation)
    if len(set(names)) != 1:
        return None
    if relation.operators == ("in",) and relation.members[0].name:
        return as_set(read(relation.members[1].text))
    result = sympy.S.Reals
    for left, operator, right in zip(relation.members, relation.operators, relation.members[1:], strict=False):
        name_first = bool(left.name)
        end = _real(read((right if name_first else left).text))
        if bool(right.name) == name_first or end is None:
            return None
        part = _ray(operator if name_first else TURNED.get(operator, operator), end)
        if part is None:
            return None
        result = sympy.Intersection(result, part)
    return result


def _set_of_absolute_value(relation: Relation) -> Any:
    """The set of a relation such as "|x| < 2" or "2 <= |x|"."""
    (left, right), operator = relation.members, relation.operators[0]
    if not _ABSOLUTE_VALUE.fullmatch(left.text):
        left, right, operator = right, left, TURNED.get(operator, operator)
    end = _real(read(right.text))
    if not _ABSOLUTE_VALUE.fullmatch(left.text) or end is None or not end.is_positive:
        return None
    upper = _ray(operator, end)
    if operator in ("<", "<="):
        return sympy.Intersection(upper, _ray(TURNED[operator], -end))
    if operator in (">", ">=", "="):
        return sympy.Union(upper, _ray(TURNED.get(operator, operator), -end))
    return None


def _ray(operator: str, end: Any) -> Any:
    if operator in ("<", "<="):
        return sympy.Interval(-sympy.oo, end, True, operator == "<")
    if operator in (">", ">="):
        return sympy.Interval(end, sympy.oo, operator == ">", True)
    if operator == "=":
        return sympy.FiniteSet(end)
    return sympy.Complement(sympy.S.Reals, sympy.FiniteSet(end)) if operator == "!=" else None
