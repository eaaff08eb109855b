r"""Reads answers that are one number: "1,234.50", "-\frac{1}{2}", "2 1/2", "1.5 \times 10^3", "50\%", "5 km/h".

Most answers are of this kind, and comparing two of them takes microseconds, where a computer algebra system takes
milliseconds. Values are exact fractions: 0.333333 is not 1/3, but 0.\overline{3} is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from megatron_fipo.verifiers.answers.units import CURRENCY, NO_UNIT, Unit, read_unit

MAX_CHARACTERS = 200
"""Longest text that is read as a number."""

_DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_PERIOD = r"(?:\\overline\{(?P<period>\d{1,40})\}|\((?P<bracketed_period>\d{1,40})\))"
_POWER_OF_TEN = (
    r"(?:[eE](?P<e>[+-]?\d{1,3})(?![A-Za-z\d])"
    r"|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*(?:\{\s*(?P<braced>[+-]?\d{1,3})\s*\}|(?P<digit>[+-]?\d{1,3})(?!\d)))"
)
_FRACTION = (
    r"(?:\\frac\s*(?:\{\s*(?P<top>[+-]?\d+)\s*\}|(?P<top1>\d))\s*(?:\{\s*(?P<bottom>[+-]?\d+)\s*\}|(?P<bottom1>\d))"
    r"|(?P<left>\d+)\s*/\s*(?P<right>[+-]?\d+)(?![\d.]))"
)
_NUMBER = re.compile(
    rf"\s*(?P<sign>[+-]?)\s*(?P<currency>{CURRENCY})?\s*(?P<inner_sign>[+-]?)\s*"
    rf"(?:(?P<whole>\d+)(?:\s+(?=\d)|\s*(?=\\frac)))?"
    rf"(?:{_FRACTION}|(?P<decimal>{_DECIMAL}|\.(?=\\overline|\())(?:{_PERIOD}|{_POWER_OF_TEN})?)"
)
_INTEGER = re.compile(r"[+-]?\d{1,18}")
_NUMBER_IN_BRACKETS = re.compile(r"[(\[]([^(),\[\]{}]*)[)\]]")

_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALE = re.compile(rf"\s*(?:\\text\s*\{{\s*)?({'|'.join(_SCALES)})s?\b\s*(\}})?")
_PERCENT = re.compile(r"\s*(?:\\?%|(?:\\text\s*\{\s*)?(?:percent|per cent|pct)\b\s*\}?)")
_MODULUS = re.compile(
    r"\s*(?:\\p?mod(?![A-Za-z])|\(\s*(?:\\text\{\s*)?\\?[bp]?mod|\\text\{\s*\(\s*mod)\s*\}?\s*\{?\s*(\w+)\s*[)}]{0,3}\s*"
)
"""The modulus behind a remainder, as in "7 (mod 10)"; "17 mod 10" without brackets is an operation."""
_ORDINAL = re.compile(r"\s*\^?\s*\{?(?:\\text\{)?\s*(?:st|nd|rd|th)\b\s*\}?\}?")


@dataclass(frozen=True)
class Tail:
    """What follows a value: a scale such as "million" as a factor, a percent sign, a unit."""

    scale: int = 1
    percent: bool = False
    unit: Unit = NO_UNIT


@dataclass(frozen=True)
class PlainNumber:
    """A number as an answer gives it.

    Attributes:
        value: the number, scaled but with a percent sign ignored: 50 for "50%".
        percent: whether it has a percent sign.
        unit: its unit; NO_UNIT if it has none.
    """

    value: Fraction
    percent: bool = False
    unit: Unit = NO_UNIT

    def equals(self, other: PlainNumber) -> bool:
        """Whether both have the same value, and units that agree: the same one, or one that is missing.

        "50%" equals 50 as well as 1/2; if both have the sign, the values must be the same.
        """
        if not tails_agree(self.percent, self.unit, other.percent, other.unit):
            return False
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        share, plain = (self, other) if self.percent else (other, self)
        return share.value == 100 * plain.value


def tails_agree(percent: bool, unit: Unit, other_percent: bool, other_unit: Unit) -> bool:
    """Whether two values' units agree; a percent sign on one side does not agree with a unit on the other."""
    if percent != other_percent and (other_unit if percent else unit):
        return False
    return unit.agrees_with(other_unit)


def read_plain_number(text: str) -> PlainNumber | None:
    """Read a cleaned text (`math_text.cleaned`) that is one number; None if it is anything else."""
    if _INTEGER.fullmatch(text):
        return PlainNumber(Fraction(int(text)))
    if len(text) > MAX_CHARACTERS:
        return None
    bracketed = _NUMBER_IN_BRACKETS.fullmatch(text)
    text = bracketed[1] if bracketed else text
    match = _NUMBER.match(text)
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    value = _value(match)
    if value is None:
        return None
    behind = text[match.end() :]
    if match["currency"]:
        tail = read_price_tail(match["currency"], behind)
    else:
        tail = read_tail(behind, ordinal=match["decimal"] is not None and "." not in match["decimal"])
    return None if tail is None else PlainNumber(value * tail.scale, tail.percent, tail.unit)


def read_tail(text: str, *, ordinal: bool = False) -> Tail | None:
    r"""Read what follows a value: "\%", " million dollars", " km/h", "^{\circ}", "st"; None if it is anything else."""
    if not text.strip():
        return Tail()
    modulus = _MODULUS.fullmatch(text)
    if modulus:
        return Tail(1, False, Unit("", frozenset([f"mod {modulus[1]}"])))
    scale = _SCALE.match(text)
    if scale and (scale[2] or "\\text" not in scale[0]):
        unit = read_unit(text[scale.end() :])
        return None if unit is None else Tail(_SCALES[scale[1]], False, unit)
    percent = _PERCENT.match(text)
    if percent:
        unit = read_unit(text[percent.end() :])
        return None if unit is None else Tail(1, True, unit)
    suffix = _ORDINAL.match(text) if ordinal else None
    unit = read_unit(text[suffix.end() :] if suffix else text, attached=not suffix and text[0].isalpha())
    return None if unit is None else Tail(1, False, unit)


def read_price_tail(currency: str, behind: str) -> Tail | None:
    """Read what follows a value with a currency before it, as in "$5 million", "$5/hour" or "$5 each"."""
    scale = _SCALE.match(behind)
    unit = read_unit(currency.replace("US$", "$").replace("US\\$", "$") + (behind[scale.end() :] if scale else behind))
    return None if unit is None else Tail(_SCALES[scale[1]] if scale else 1, False, unit)


def _value(match: re.Match[str]) -> Fraction | None:
    sign = -1 if "-" in (match["sign"], match["inner_sign"]) else 1
    if match["decimal"] is not None:
        if match["whole"] is not None:  # "2 3" is not a number
            return None
        digits = match["decimal"].replace(",", "")
        period = match["period"] or match["bracketed_period"]
        if period:
            return sign * _repeating(digits, period) if "." in digits else None
        if digits == ".":
            return None
        exponent = int(match["e"] or match["braced"] or match["digit"] or 0)
        return sign * Fraction(digits.rstrip(".")) * Fraction(10) ** exponent
    top = int(match["top"] or match["top1"] or match["left"])
    bottom = int(match["bottom"] or match["bottom1"] or match["right"])
    if bottom == 0:
        return None
    fraction = Fraction(top, bottom)
    if match["whole"] is None:
        return sign * fraction
    return sign * (int(match["whole"]) + fraction) if 0 < fraction < 1 else None


def _repeating(digits: str, period: str) -> Fraction:
    r"""Value of a repeating decimal such as 0.1\overline{6}: the period after the digits is a geometric series."""
    places = len(digits.partition(".")[2])
    return Fraction(digits.rstrip(".") or "0") + Fraction(int(period), (10 ** len(period) - 1) * 10**places)
