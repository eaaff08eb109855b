"""What an answer may be: a quantity, words, a choice, a time, a numeral with its base, a ratio, several, a relation."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeAlias

from megatron_fipo.verifiers.answers.units import Unit


@dataclass(frozen=True)
class Quantity:
    """A number or an expression, and what stands beside it.

    Attributes:
        expression: LaTeX of the value, without its unit.
        value: exact, where it is one plain number.
        percent: whether it has a percent sign.
        unit: beside it.
        text: the whole, cleaned.
    """

    expression: str
    value: Fraction | None
    percent: bool
    unit: Unit
    text: str


@dataclass(frozen=True)
class Words:
    """Text that is compared as text: in lower case, with single spaces."""

    text: str


@dataclass(frozen=True)
class Choice:
    """A letter out of several, perhaps with what it stands for.

    Attributes:
        letter: in upper case.
        content: what stands behind the letter; None without it.
        text: the whole, cleaned; a lone letter may be a variable, too.
    """

    letter: str
    content: Reading | None
    text: str


@dataclass(frozen=True)
class ClockTime:
    """A time of day as written: hours and minutes, "am", "pm" or nothing.

    Attributes:
        bare_hour: whether it has an hour alone, as "8 am", which is also the number 8.
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
    """a:b or a:b:c."""

    parts: tuple[Reading, ...]


@dataclass(frozen=True)
class Dots:
    """The dots of a list that goes on."""


@dataclass(frozen=True)
class Several:
    """Several answers.

    Attributes:
        items: in the order written.
        brackets: around them: "()", "[]", "[)", "(]", "{}", "<>"; empty for a bare list.
        joiner: what stands between them: ",", "or", "and", "->"; "+" for parts of one, as in "2 hours 30 minutes".
        condition: what a last member says of the variables, as "k in Z"; empty without one.
    """

    items: tuple[Reading, ...]
    brackets: str = ""
    joiner: str = ","
    condition: str = ""

    @property
    def in_order(self) -> bool:
        """Whether the order counts by itself: in arrows and in lists with dots; in tuples, it counts against tuples."""
        return self.joiner in ("->", "+") or any(isinstance(item, Dots) for item in self.items)


@dataclass(frozen=True)
class Union:
    r"""Sets joined by \cup."""

    parts: tuple[Reading, ...]


@dataclass(frozen=True)
class Member:
    """One side of a relation: its text, and whether that names a variable, a function's value or a thing in words."""

    text: str
    name: str = field(compare=False)


@dataclass(frozen=True)
class Relation:
    r"""Members with relations between them: "x = 5", "0 < x < 3", "x \in [1,2]"; the first may be missing, as in "< 2".

    Attributes:
        members: one more than `operators`.
        operators: each of = < > <= >= != ~ in notin ==, as this module spells them.
    """

    members: tuple[Member, ...]
    operators: tuple[str, ...]


Reading: TypeAlias = Quantity | Words | Choice | ClockTime | Numeral | Ratio | Dots | Several | Union | Relation
