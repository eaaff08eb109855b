"""The kinds of parsed answers; `Reading` is any of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

from megatron_fipo.verifiers.answers.units import Unit


@dataclass(frozen=True)
class Quantity:
    """A number or an expression, with its unit and percent sign.

    Attributes:
        expression: LaTeX of the value, without its unit.
        value: the exact value of a plain number; None for any other expression.
        percent: whether it has a percent sign.
        unit: its unit; NO_UNIT if it has none.
        text: the whole cleaned answer.
    """

    expression: str
    value: Fraction | None
    percent: bool
    unit: Unit
    text: str


@dataclass(frozen=True)
class Words:
    """Text that is compared as text; in lower case, with single spaces."""

    text: str


@dataclass(frozen=True)
class Choice:
    """The letter of a multiple-choice answer, possibly with the choice's content.

    Attributes:
        letter: the letter, in upper case.
        content: the content that follows the letter; None without one.
        text: the whole cleaned answer; a lone letter may also be a variable.
    """

    letter: str
    content: Reading | None
    text: str


@dataclass(frozen=True)
class ClockTime:
    """A time of day as written.

    Attributes:
        hour: the hour as written, on the 12-hour or 24-hour clock.
        minute: the minute; 0 if it is not written.
        second: the second; 0 if it is not written.
        meridiem: "am" or "pm"; "" if neither is written.
        bare_hour: whether no minute is written, as in "8 am", which also equals the number 8.
        text: the whole, without \\text{…}.
    """

    hour: int
    minute: int
    second: int
    meridiem: str
    bare_hour: bool
    text: str


@dataclass(frozen=True)
class Numeral:
    """Digits with the base that they are written in."""

    digits: str
    base: int


@dataclass(frozen=True)
class Ratio:
    """A ratio a:b, or a:b:c and so on."""

    parts: tuple[Reading, ...]


@dataclass(frozen=True)
class Dots:
    """The dots in a list."""


@dataclass(frozen=True)
class Several:
    """Several answers.

    Attributes:
        items: the members, in the order written.
        brackets: the brackets around them: "()", "[]", "[)", "(]", "{}" or "<>"; empty for a bare list.
        joiner: how they are joined: ",", "or", "and" or "->"; "+" for the parts of one quantity, as in "2 hours 30
            minutes"; "+-" for the two values of an expression with plus-minus.
        condition: a condition on variables, such as "k in Z", from the first or last member; empty without one.
    """

    items: tuple[Reading, ...]
    brackets: str = ""
    joiner: str = ","
    condition: str = ""

    @property
    def in_order(self) -> bool:
        """Whether the order always counts: with arrows, parts of a quantity or dots. `equality` decides for tuples."""
        return self.joiner in ("->", "+") or any(isinstance(item, Dots) for item in self.items)


@dataclass(frozen=True)
class Union:
    r"""Sets joined by \cup."""

    parts: tuple[Reading, ...]


@dataclass(frozen=True)
class Member:
    """One side of a relation.

    Attributes:
        text: its text, cleaned.
        name: the normalized text if it names a variable, a function's value or a thing in words; else "".
    """

    text: str
    name: str = field(compare=False)


@dataclass(frozen=True)
class Relation:
    r"""Members with relations between them: "x = 5", "0 < x < 3", "x \in [1,2]".

    Attributes:
        members: the members, one more than `operators`. The text of the first is empty if it is missing, as in "< 2".
        operators: the relations, each one of = < > <= >= != ~ in notin == prop sub sub=.
    """

    members: tuple[Member, ...]
    operators: tuple[str, ...]


Reading: TypeAlias = Quantity | Words | Choice | ClockTime | Numeral | Ratio | Dots | Several | Union | Relation
