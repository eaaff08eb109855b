"""Compares two parsed answers by the rules of docs/verifiers.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy

from megatron_fipo.verifiers.answers import algebra
from megatron_fipo.verifiers.answers.clock_times import same_time
from megatron_fipo.verifiers.answers.number_sets import TURNED, as_set, between_ends
from megatron_fipo.verifiers.answers.numerals import same_digits
from megatron_fipo.verifiers.answers.reader import read
from megatron_fipo.verifiers.answers.readings import (
    Choice,
    ClockTime,
    Dots,
    Member,
    Numeral,
    Quantity,
    Ratio,
    Reading,
    Relation,
    Several,
    Union,
    Words,
)
from megatron_fipo.verifiers.answers.units import NO_UNIT
from megatron_fipo.verifiers.answers.values import difference, exact_value, value_of
from megatron_fipo.verifiers.math_text import without_layout
from megatron_fipo.verifiers.plain_numbers import tails_agree


def equal_answers(first: Reading, second: Reading) -> bool:
    """Whether two whole answers are equal. A list or set of one member equals it, but not inside a collection."""
    conditions = {side.condition for side in (first, second) if isinstance(side, Several) and side.condition}
    return len(conditions) < 2 and equal(_lone(first), _lone(second))


def _lone(reading: Reading) -> Reading:
    return reading.items[0] if isinstance(reading, Several) and len(reading.items) == 1 else reading


def equal(first: Reading, second: Reading) -> bool:
    """Whether two answers are equal; a name, unit or the like that only one of them states is ignored."""
    if first == second:
        return True
    for kinds, compare in _RULES:
        if isinstance(first, kinds):
            return compare(first, second)
        if isinstance(second, kinds):
            return compare(second, first)
    return False


# ------------------------------------------------------------------------------------------------- choices and words


def _choice_equals(choice: Choice, other: Reading) -> bool:
    """Compare letters and, if both choices have a content, contents; with an answer without a letter, the content."""
    if isinstance(other, Choice):
        if choice.letter != other.letter:
            return False
        return choice.content is None or other.content is None or equal(choice.content, other.content)
    if choice.content is not None:
        return equal(choice.content, other)
    if isinstance(other, (Quantity, Relation)) and len(choice.text) == 1:
        return equal(Quantity(choice.text, None, False, NO_UNIT, choice.text), other)
    return False


def _words_equal(words: Words, other: Reading) -> bool:
    """Text equals the same text only, possibly as the value of a name: "day = Tuesday"."""
    if isinstance(other, Relation):
        value = value_of(other)
        return value is not None and equal(words, value)
    return isinstance(other, Words) and words.text == other.text


# ------------------------------------------------------------------------------------- values: numbers, times, ratios


def _quantity_equals(quantity: Quantity, other: Reading) -> bool:
    if not isinstance(other, Quantity):
        return False
    if without_layout(quantity.text) == without_layout(other.text):
        return True
    if not tails_agree(quantity.percent, quantity.unit, other.percent, other.unit):
        return _as_products(quantity, other)
    if quantity.value is not None and other.value is not None:
        return _equal_values(quantity, other, lambda a, b: a == b, quantity.value, other.value)
    first, second = exact_value(quantity), exact_value(other)
    return _equal_values(quantity, other, algebra.equal, first, second) or _as_products(quantity, other)


def _equal_values(
    quantity: Quantity, other: Quantity, same: Callable[[Any, Any], bool], first: Any, second: Any
) -> bool:
    """Whether two values are equal; a percent sign on one side only may divide that side by a hundred."""
    if first is None or second is None:
        return False
    if same(first, second):
        return True
    if quantity.percent == other.percent or isinstance(first, sympy.MatrixBase) or isinstance(second, sympy.MatrixBase):
        return False
    if isinstance(first, sympy.Set) or isinstance(second, sympy.Set):
        return False
    return same(first, 100 * second) if quantity.percent else same(100 * first, second)


def _as_products(quantity: Quantity, other: Quantity) -> bool:
    """Whether an answer is equal with its unit read as a factor: "2 s" for "s + s"."""
    units = [side for side in (quantity, other) if side.unit]
    if len(units) != 1 or "\\text" in units[0].text or not _LETTER_BEHIND_NUMBER.fullmatch(units[0].text):
        return False
    plain = other if units[0] is quantity else quantity
    value = exact_value(plain)
    if not isinstance(value, sympy.Expr) or not value.free_symbols:
        return False
    return algebra.equal(algebra.parse(units[0].text), value)


_LETTER_BEHIND_NUMBER = re.compile(r"[\d.]+ [A-Za-z](?:\^\{?\d\}?)?")


def _time_equals(time: ClockTime, other: Reading) -> bool:
    """Compare a time with a time, "8 am" with the number 8, and "10:15" as a ratio with a ratio that is no time."""
    if isinstance(other, ClockTime):
        return same_time(time, other)
    if isinstance(other, Quantity):
        full_hour = time.bare_hour or (time.meridiem and not (time.minute or time.second))
        return bool(full_hour) and other.value == time.hour and not other.unit and not other.percent
    if isinstance(other, Ratio) and not time.meridiem:
        numbers = [Fraction(part) for part in time.text.split(":")]
        return _proportional([algebra.rational(number) for number in numbers], _ratio_values(other))
    return False


def _numeral_equals(numeral: Numeral, other: Reading) -> bool:
    """Compare digits and bases; a number without a base must have the same digits."""
    if isinstance(other, Numeral):
        return numeral == other
    if not isinstance(other, Quantity) or other.unit or other.percent:
        return False
    return other.expression.replace(",", "").isalnum() and same_digits(other.expression) == numeral.digits


def _ratio_equals(ratio: Ratio, other: Reading) -> bool:
    values = _ratio_values(ratio)
    if isinstance(other, Ratio):
        return _proportional(values, _ratio_values(other))
    if (
        isinstance(other, Quantity)
        and len(values) == 2
        and None not in values
        and not algebra.equal(values[1], sympy.S.Zero)
    ):
        return algebra.equal(values[0] / values[1], exact_value(other))
    return False


def _ratio_values(ratio: Ratio) -> list[Any]:
    values = []
    for part in ratio.parts:
        text = part.text if isinstance(part, Choice) else ""
        values.append(
            exact_value(part) if isinstance(part, Quantity) else algebra.parse(text) if len(text) == 1 else None
        )
    return values


def _proportional(first: Sequence[Any], second: Sequence[Any]) -> bool:
    if len(first) != len(second) or not all(isinstance(value, sympy.Expr) for value in (*first, *second)):
        return False
    if all(algebra.equal(value, sympy.S.Zero) for value in first) or all(
        algebra.equal(value, sympy.S.Zero) for value in second
    ):
        return False
    return all(algebra.equal(first[i] * second[j], first[j] * second[i]) for i in range(len(first)) for j in range(i))


# ---------------------------------------------------------------------------------------------------- several answers


def _several_equal(several: Several, other: Reading) -> bool:
    if isinstance(other, Relation):
        value = value_of(other)
        if value is not None and equal(several, value):
            return True
        if _tuples_equated(several, other) or _equal_as_sets(several, other):
            return True
        between = between_ends(other)
        return between is not None and several.brackets == between.brackets and equal(several, between)
    if isinstance(other, Union):
        return _equal_as_sets(several, other)
    if isinstance(other, Quantity):
        return _equal_as_sets(several, other)
    if not isinstance(other, Several):
        return False
    if several.condition and other.condition and several.condition != other.condition:
        return False
    if several.brackets and other.brackets and several.brackets != other.brackets:
        return _equal_as_sets(several, other) and "{}" not in (several.brackets, other.brackets)
    if {"->", "+"} & {several.joiner, other.joiner} and several.joiner != other.joiner:
        return False
    if {several.brackets, other.brackets} & {"[)", "(]"} and not (several.brackets and other.brackets):
        return False
    # A tuple's order counts, also in comparison with a list without brackets: "5, 2" is not the point (2,5).
    tuples = any(side.brackets not in ("", "{}") for side in (several, other))
    if tuples or several.in_order or other.in_order:
        in_place = (
            len(several.items) == len(other.items)
            and not (tuples and (_is_one_name(several) or _is_one_name(other)))
            and all(map(equal, several.items, other.items))
        )
        return in_place or (several.brackets != other.brackets and _equal_as_sets(several, other))
    first, second = list(several.items), list(other.items)
    if "{}" in (several.brackets, other.brackets):  # a set has no repeats
        first, second = _distinct(first), _distinct(second)
    return _matched(first, second) or _equal_as_sets(several, other)


def _is_one_name(several: Several) -> bool:
    """Whether a collection lists several values of one name, such as "x = 2, x = 5", which are not a point."""
    names = [item.members[0].name if isinstance(item, Relation) else "" for item in several.items]
    return len(names) > 1 and len(set(names)) == 1 and bool(names[0])


def _distinct(items: list[Reading]) -> list[Reading]:
    kept: list[Reading] = []
    for item in items:
        if not any(equal(item, other) for other in kept):
            kept.append(item)
    return kept


def _matched(first: list[Reading], second: list[Reading]) -> bool:
    """Whether the members can be matched into equal pairs (bipartite matching by augmenting paths)."""
    if len(first) != len(second):
        return False
    partner: dict[int, int] = {}

    def pair(index: int, seen: set[int]) -> bool:
        for candidate, item in enumerate(second):
            if candidate in seen or not equal(first[index], item):
                continue
            seen.add(candidate)
            if candidate not in partner or pair(partner[candidate], seen):
                partner[candidate] = index
                return True
        return False

    return all(pair(index, set()) for index in range(len(first)))


def _tuples_equated(several: Several, relation: Relation) -> bool:
    """Whether one answer is like "a = 1, b = 2" and the other like "(a, b) = (1, 2)", with equal values."""
    if relation.operators != ("=",):
        return False
    names = read(relation.members[0].text)
    values = read(relation.members[1].text)
    if not (isinstance(names, Several) and isinstance(values, Several) and len(names.items) == len(values.items)):
        return False
    if len(several.items) != len(names.items):
        return False
    wanted = {getattr(name, "text", ""): value for name, value in zip(names.items, values.items, strict=True)}
    for item in several.items:
        if not isinstance(item, Relation) or item.operators != ("=",) or item.members[0].text not in wanted:
            return False
        if not equal(read(item.members[1].text), wanted.pop(item.members[0].text)):
            return False
    return not wanted


# --------------------------------------------------------------------------------------------------------- relations


def _relation_equals(relation: Relation, other: Reading) -> bool:
    if isinstance(other, Relation):
        return _relations_equal(relation, other)
    value = value_of(relation)
    if value is not None and equal_answers(value, other):
        return True
    return isinstance(other, (Union, Quantity)) and _equal_as_sets(relation, other)


def _relations_equal(first: Relation, second: Relation) -> bool:
    if first.operators == second.operators and _same_members(first.members, second.members):
        return True
    turned = Relation(second.members[::-1], tuple(TURNED.get(sign, sign) for sign in second.operators[::-1]))
    if (
        first.operators == turned.operators
        and "in" not in first.operators
        and _same_members(first.members, turned.members)
    ):
        return True
    if set(first.operators) == set(second.operators) == {"="}:
        if first.members[0].name and first.members[0].name == second.members[0].name:
            values = value_of(first), value_of(second)
            if values[0] is not None and values[1] is not None and equal(values[0], values[1]):
                return True
        return len(first.members) == len(second.members) == 2 and _equations_equal(first, second)
    if len(first.members) == len(second.members) == 2 and (
        first.operators == second.operators or first.operators == turned.operators
    ):
        same_way = second if first.operators == second.operators else turned
        ordered = first.operators[0] in TURNED
        if (ordered or first.operators[0] == "!=") and algebra.equal_up_to_factor(
            difference(first), difference(same_way), positive=ordered
        ):
            return True
    return _equal_as_sets(first, second)


def _same_members(first: Sequence[Member], second: Sequence[Member]) -> bool:
    """Whether names agree or are missing on one side, and all other members are equal."""
    for one, other in zip(first, second, strict=True):
        if not one.text or not other.text:  # "> 2" has no name
            if (one.text and not one.name) or (other.text and not other.name):
                return False
            continue
        if one.name and other.name:
            if one.name != other.name:
                return False
        elif not equal(read(one.text), read(other.text)):
            return False
    return True


def _equations_equal(first: Relation, second: Relation) -> bool:
    return algebra.equal_up_to_factor(difference(first), difference(second))


# ------------------------------------------------------------------------------------------------------------ sets


def _union_equals(union: Union, other: Reading) -> bool:
    if isinstance(other, Union) and _matched(list(union.parts), list(other.parts)):
        return True
    return _equal_as_sets(union, other)


def _equal_as_sets(first: Reading, second: Reading) -> bool:
    """Whether two answers are the same set of numbers, written as intervals, unions, inequalities or lists."""
    one, other = as_set(first), as_set(second)
    return one is not None and other is not None and algebra.equal_sets(one, other)


def _dots_equal(dots: Dots, other: Reading) -> bool:
    return isinstance(other, Dots)


_RULES: tuple[tuple[type, Callable[[Any, Reading], bool]], ...] = (
    (Choice, _choice_equals),
    (Dots, _dots_equal),
    (Words, _words_equal),
    (Several, _several_equal),
    (Relation, _relation_equals),
    (Union, _union_equals),
    (ClockTime, _time_equals),
    (Numeral, _numeral_equals),
    (Ratio, _ratio_equals),
    (Quantity, _quantity_equals),
)
"""The rule of each kind. For two different kinds, the earlier entry's rule applies."""
