r"""Reading answers that are one number: "1,234.50", "-\frac{1}{2}", "2 1/2", "1.5 \times 10^3", "50\%", "5 cm".

Most answers are of this kind, and comparing two of them takes microseconds where a computer algebra system takes
milliseconds. Values are fractions of whole numbers: 0.333333 is not 1/3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 200
"""Longer texts are not taken for a number."""

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_POWER_OF_TEN = (
    r"(?:[eE](?P<e>[+-]?\d{1,3})|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{(?P<braced>[+-]?\d{1,3})\}|(?P<digit>\d)))"
)
_FRACTION = (
    r"(?:\\frac\s*(?:\{\s*(?P<top>[+-]?\d+)\s*\}|(?P<top1>\d))\s*(?:\{\s*(?P<bottom>[+-]?\d+)\s*\}|(?P<bottom1>\d))"
    r"|(?P<left>\d+)\s*/\s*(?P<right>[+-]?\d+))"
)
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SHORT_UNITS = "cm|mm|km|kg|mg|ft|hr|lb|oz|ml|mi|mph"
_NOT_UNITS = r"(?!(?:pi|factorial|squared|cubed|half|root|sqrt|times|divided|over|plus|minus|and|mod)\b)"
# A bare unit is a word of three letters and more, so that "2 pi" and "5 x" stay products.
_WORDS = rf"{_NOT_UNITS}(?:[A-Za-z]{{3,}}(?:\s+[A-Za-z]+){{0,3}}|(?:{_SHORT_UNITS})\b)"
_UNIT = (
    r"(?:\s*(?P<percent>\\?%|\\text\{\s*percent\s*\}|percent\b)"
    r"|\s*(?P<degree>\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree)"
    rf"|\s*\\(?:text|mathrm|textrm|mbox|operatorname)\s*\{{\s*(?P<latex_unit>{_NOT_UNITS}[A-Za-z][A-Za-z ./]*)\s*\}}"
    rf"|\s+(?P<scale>{'|'.join(_SCALES)})(?:\s+{_WORDS})?"
    rf"|\s+(?P<unit>{_WORDS}))(?:\s*\^\s*(?:\{{(?P<braced_power>[23])\}}|(?P<power>[23])))?"
)
_CURRENCY = r"(?:\\?\$|€|£|\\text\{\s*\$\s*\})"
_NUMBER = re.compile(
    rf"\s*(?P<sign>[+-]?)\s*{_CURRENCY}?\s*"
    rf"(?:(?P<whole>\d+)(?:\s+(?=\d)|\s*(?=\\frac)))?(?:{_FRACTION}|(?P<decimal>{_DECIMAL}){_POWER_OF_TEN}?)"
    rf"\s*{_CURRENCY}?(?:{_UNIT})?\s*"
)

_NUMBER_IN_BRACKETS = re.compile(r"\(([^(),]*)\)")


@dataclass(frozen=True)
class PlainNumber:
    """A number as an answer gives it.

    Attributes:
        readings: its value; behind a percent sign two values, since "50%" answers both for 50 and for 1/2.
        unit: in lower case and the singular, empty where none is given.
    """

    readings: frozenset[Fraction]
    unit: str = ""

    def equals(self, other: PlainNumber) -> bool:
        """Whether both name the same value, in the same unit or in one that is left open."""
        return bool(self.readings & other.readings) and (self.unit == other.unit or not (self.unit and other.unit))


def read_plain_number(text: str) -> PlainNumber | None:
    """The number that a cleaned text (`math_text.cleaned`) consists of; None if it is anything else."""
    if len(text) > MAX_CHARACTERS:
        return None
    bracketed = _NUMBER_IN_BRACKETS.fullmatch(text)
    match = _NUMBER.fullmatch(bracketed[1] if bracketed else text)
    if match is None:
        return None
    value = _value(match)
    if value is None:
        return None
    if match["percent"]:
        return PlainNumber(frozenset({value, value / 100}))
    if match["scale"]:
        return PlainNumber(frozenset({value * _SCALES[match["scale"]]}))
    return PlainNumber(frozenset({value}), _unit(match))


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"] is not None:
        if match["whole"] is not None:  # "2 3" is no number
            return None
        exponent = int(match["e"] or match["braced"] or match["digit"] or 0)
        return sign * Fraction(match["decimal"].replace(",", "").rstrip(".")) * Fraction(10) ** exponent
    top = int(match["top"] or match["top1"] or match["left"])
    bottom = int(match["bottom"] or match["bottom1"] or match["right"])
    if bottom == 0:
        return None
    fraction = Fraction(top, bottom)
    if match["whole"] is None:
        return sign * fraction
    return sign * (int(match["whole"]) + fraction) if 0 < fraction < 1 else None


def _unit(match: re.Match[str]) -> str:
    if match["degree"]:
        return "degree"
    name = " ".join((match["unit"] or match["latex_unit"] or "").lower().replace(".", " ").split())
    power = match["braced_power"] or match["power"] or ""
    return (name[:-1] if name.endswith("s") and len(name) > 2 else name) + power
