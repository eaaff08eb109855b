r"""Reads units, currencies and other words after a value: "km/h" is "kilometers per hour", "cm^2" "square centimeters".

Nothing is converted: a metre does not equal a hundred centimetres.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

_SPELLINGS = {
    "km": "kilometer kilometre kms",
    "m": "meter metre",
    "dm": "decimeter decimetre",
    "cm": "centimeter centimetre cms",
    "mm": "millimeter millimetre",
    "nm": "nanometer nanometre",
    "mi": "mile",
    "yd": "yard yds",
    "ft": "foot feet",
    "in": "inch inches",
    "kg": "kilogram kilogramme kgs kilo",
    "g": "gram gramme",
    "mg": "milligram",
    "t": "tonne",
    "lb": "pound lbs",
    "oz": "ounce",
    "h": "hour hr hrs",
    "min": "minute mins",
    "s": "second sec secs",
    "ms": "millisecond",
    "d": "day",
    "wk": "week",
    "yr": "year yrs",
    "L": "liter litre l",
    "mL": "milliliter millilitre ml",
    "gal": "gallon",
    "A": "ampere amp",
    "V": "volt",
    "W": "watt",
    "kW": "kilowatt",
    "N": "newton",
    "kN": "kilonewton",
    "J": "joule",
    "kJ": "kilojoule",
    "K": "kelvin",
    "Pa": "pascal",
    "kPa": "kilopascal",
    "Hz": "hertz",
    "mol": "mole",
    "rad": "radian",
    "degree": "degree deg",
    "celsius": "celsius centigrade C",
    "fahrenheit": "fahrenheit F",
    "dollar": "dollar USD usd bucks buck",
    "cad": "CAD",
    "aud": "AUD",
    "chf": "CHF",
    "yuan": "yuan CNY RMB",
    "cent": "cent",
    "euro": "euro EUR eur",
    "gbp": "GBP gbp",
    "yen": "yen JPY",
    "rupee": "rupee INR Rs rs",
}
_KNOWN = {spelling: unit for unit, spellings in _SPELLINGS.items() for spelling in (unit, *spellings.split())}
_SYMBOLS = {"$": "dollar", "€": "euro", "£": "gbp", "¥": "yen", "₹": "rupee"}
_CURRENCIES = frozenset([*_SYMBOLS.values(), "cent", "cad", "aud", "chf", "yuan"])
_WHOLE = {"mph": "mi/h", "kph": "km/h", "kmph": "km/h", "kmh": "km/h", "psi": "lb/in^2", "cc": "cm^3", "sqft": "ft^2"}

ONE_LETTER_UNITS = "mgshLlAVWNJKCF"
"""Letters that are units after a number and a space; other letters are factors."""

CURRENCY = (
    r"(?:US|\\text\s*\{\s*)?\\?\$(?:\s*\})?|[€£¥₹]"
    r"|(?:\\text\s*\{\s*)?(?:USD|EUR|GBP|JPY|INR|CAD|AUD|CHF|CNY|RMB|Rs\.?)(?:\s*\})?(?=\s*-?[\d.]*\d)"
)
"""Regular expression of a currency's sign, or of its name in front of a number."""

_CHANGING = frozenset(
    [
        "not",
        "no",
        "non",
        "except",
        "excluding",
        "without",
        "than",
        "least",
        "most",
        "about",
        "approximately",
        "approx",
        "roughly",
        "around",
        "nearly",
        "almost",
        "over",
        "under",
        "above",
        "below",
        "or",
    ]
)
"""Words that change the value or the relation; a unit with one agrees only with the same unit."""

_SHORT_WORDS = frozenset(
    ["am", "an", "as", "at", "be", "by", "do", "in", "is", "it", "of", "on", "to", "up", "us", "we"]
)
_NOT_UNITS = re.compile(
    r"(?:pi|factorial|squared|cubed|half|root|sqrt|times(?=\s*[\d(\\])|divided|plus|minus|and|mod|choose|if|where|when|for|is|are|was|were|"
    r"because|since|so|but|then|theta|alpha|beta)\b"
)
_TEXT = re.compile(r"\\(?:text|operatorname)\s*\{([^{}]*)\}")
_POWER = re.compile(r"\^\s*\{?\s*(-?\d)\s*\}?")
_DEGREE = re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?![A-Za-z])")
_OHM = re.compile(r"(?<![A-Za-z])([kMm]?)\s*\\Omega(?![A-Za-z])")
_TOKEN = re.compile(r"\^-?\d|[^\W\d_]+(?:['-][^\W\d_]+)*|\\?\$|[€£¥₹/*]|'{1,2}|\"")
_IGNORED = re.compile(r"[\s.,()~-]+|\\cdot(?![A-Za-z])|\\times(?![A-Za-z])")
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_MAX_WORDS = 8
_MAX_CHARACTERS = 100


@dataclass(frozen=True)
class Unit:
    """The unit and the words beside a value.

    Attributes:
        measure: units of measurement and currencies in one spelling, such as "kg*m/s^2"; empty without one.
        words: all other words, in lower case and the singular: "red apples" gives {"red", "apple"}.
    """

    measure: str = ""
    words: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.measure or self.words)

    @property
    def changes(self) -> bool:
        """Whether a word in it changes the value's meaning, such as "or" in "or more", or "not"."""
        return not _CHANGING.isdisjoint(self.words)

    @property
    def is_modulus(self) -> bool:
        """Whether it is the modulus of a remainder, such as "mod 10"."""
        return len(self.words) == 1 and next(iter(self.words)).startswith("mod ")

    def agrees_with(self, other: Unit) -> bool:
        """Whether two units agree: parts that both have must be the same; other parts must not change the value."""
        if self == other:
            return True
        if self.changes or other.changes:
            return False
        if not self or not other:
            return True
        if bool(self.measure) != bool(other.measure) and not (self.words and other.words):
            return False  # "5 cm" and "5 apples"
        measures = not (self.measure and other.measure) or _same_measure(self.measure, other.measure)
        words = not (self.words and other.words) or self.words <= other.words or other.words <= self.words
        return measures and words

    def __str__(self) -> str:
        return " ".join([*([self.measure] if self.measure else []), *sorted(self.words)])


NO_UNIT = Unit()


def _same_measure(first: str, second: str) -> bool:
    """Whether two measures are the same; degrees may be Celsius or Fahrenheit, and pounds weight or money."""
    if first == second:
        return True
    pair = {first, second}
    return pair in ({"degree", "celsius"}, {"degree", "fahrenheit"}, {"lb", "gbp"})


@lru_cache(maxsize=4096)
def read_unit(text: str, *, attached: bool = False) -> Unit | None:
    r"""Read the text after a value as a unit, such as "\text{ cm}^2", "km/h" or "^{\circ}C"; None if it is no unit.

    Args:
        text: cleaned LaTeX (`math_text.cleaned`).
        attached: whether it follows the value without a space; then only units of several letters are no factors.
    """
    if not text.strip():
        return NO_UNIT
    if len(text) > _MAX_CHARACTERS:
        return None
    in_text = "\\text" in text
    text = _OHM.sub(r" \1ohm ", text)
    text = _POWER.sub(r"^\1", _TEXT.sub(r" \1 ", _DEGREE.sub(" degree ", text)))
    bare = text if not in_text else ""
    tokens: list[str] = []
    position = 0
    while position < len(text):
        ignored = _IGNORED.match(text, position)
        token = _TOKEN.match(text, position)
        if ignored and not text.startswith("'", position):
            position = ignored.end()
        elif token:
            tokens.append(token[0].replace("\\", ""))
            position = token.end()
        else:
            return None
    if len(tokens) > _MAX_WORDS or (bare and not _may_be_bare(bare.strip(), tokens, attached)):
        return None
    return _unit(tokens)


def _may_be_bare(text: str, tokens: list[str], attached: bool) -> bool:
    """Whether letters outside \\text{…} are units rather than factors: "5 m" and "5 apples", not "5 x" or "5ab"."""
    words = [token for token in tokens if token[0].isalpha()]
    if _NOT_UNITS.match(text) or text[0] in "/*^":
        return False
    if tokens[0] == "degree" or not tokens[0].isascii() or tokens[0][0] in "'\"":
        return True
    if attached and words:
        return tokens[0] in "$€£¥₹" or (len(words[0]) > 1 and words[0] in _KNOWN and words[0] not in {"in", "mi", "ms"})
    return all(
        len(word) > 2
        or word in _POWERS
        or (word in _KNOWN and (len(word) == 2 or word in ONE_LETTER_UNITS))
        or word in _SHORT_WORDS
        or word == "US"
        for word in words
    )


def _unit(tokens: list[str]) -> Unit:
    powers: dict[str, int] = {}
    words: set[str] = set()
    sign, pending, last = 1, 1, ""
    for token in tokens:
        word = token.lower()
        if token == "US":
            continue  # "5 US dollars"
        if token[0] == "^" or word in {"squared", "cubed"}:
            factor = {"squared": 2, "cubed": 3}.get(word) or int(token[1:])
            if last:
                powers[last] = powers[last] * factor
            else:
                words.add(token)
        elif word in _POWERS:
            pending = _POWERS[word]
        elif word in {"/", "per"}:
            sign = -1
        elif token == "*":
            continue
        else:
            # A short unit comes first, not after words: the "min" in "local min" is not a minute.
            measure = _SYMBOLS.get(token) or ("" if words and len(word) < 4 else _measure(token))
            if measure in {"celsius", "fahrenheit"} and "degree" in powers:
                del powers["degree"]
            if measure:
                if measure in _CURRENCIES and measure in powers:
                    continue  # "$5 dollars" names its currency twice
                for part in re.finditer(r"(/?)([A-Za-z]+)(?:\^(\d))?", _WHOLE.get(word, measure)):
                    powers[part[2]] = powers.get(part[2], 0) + sign * (-1 if part[1] else 1) * pending * int(
                        part[3] or 1
                    )
                last = measure if measure in powers else ""
            else:
                words.add(("per " if sign < 0 else "") + _singular(word) + (f"^{pending}" if pending > 1 else ""))
                last = ""
            pending, sign = 1, 1
    over = [name + (f"^{power}" if power > 1 else "") for name, power in sorted(powers.items()) if power > 0]
    under = [name + (f"^{-power}" if power < -1 else "") for name, power in sorted(powers.items()) if power < 0]
    return Unit("/".join(["*".join(over), *under]), frozenset(words))


def _measure(token: str) -> str:
    lower = token.lower()
    for spelling in (token, lower):
        for form in (spelling, spelling[:-1] if len(spelling) > 3 and spelling.endswith("s") else spelling):
            if form in _WHOLE:
                return _WHOLE[form]
            if form in _KNOWN and (len(form) > 1 or form == token):
                return _KNOWN[form]
    return ""


def _singular(word: str) -> str:
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word
