r"""Parses a final answer: one line of cleaned text into one of `readings`.

`_read` tries the kinds in this order: a time, a numeral with a base, a plain number, a choice, a quantity in several
units, a relation in words, several answers, brackets, a relation in signs, a union, a ratio, words, and last an
expression with its unit.
"""

from __future__ import annotations

import re
from functools import lru_cache

from megatron_fipo.verifiers.answers.choices import split_choice
from megatron_fipo.verifiers.answers.clock_times import read_clock_time
from megatron_fipo.verifiers.answers.numerals import read_numeral
from megatron_fipo.verifiers.answers.readings import (
    Choice,
    Dots,
    Member,
    Quantity,
    Ratio,
    Reading,
    Relation,
    Several,
    Union,
    Words,
)
from megatron_fipo.verifiers.answers.scanning import in_brackets, split_at, top_level
from megatron_fipo.verifiers.answers.units import CURRENCY, NO_UNIT, read_unit
from megatron_fipo.verifiers.plain_numbers import read_plain_number, read_tail

MAX_ITEMS = 200
"""Largest number of parts; an answer with more is not split."""

MAX_DEPTH = 12
"""Deepest nesting of collections; a deeper one is read as text."""

_OPERATORS = {
    "=": "=", "<": "<", ">": ">", r"\le": "<=", r"\ge": ">=", r"\ne": "!=", r"\approx": "~", r"\sim": "~",
    r"\in": "in", r"\notin": "notin", r"\equiv": "==", r"\propto": "prop", r"\subset": "sub", r"\subseteq": "sub=",
}  # fmt: skip
_JOINERS = {
    ",": ",", ";": ",", "and": "and", "or": "or", r"\lor": "or", r"\vee": "or", r"\land": "and", r"\wedge": "and",
    r"\&": "and", "&": "and", r"\to": "->", r"\Rightarrow": "->", r"\implies": "->", r"\iff": "->", r"\\": ",",
    r"\Leftrightarrow": "->", r"\mapsto": "->",
}  # fmt: skip
_IN_WORDS = [
    (re.compile(r"(?:strictly )?(?:less|fewer|smaller|lower) than (?!or)(.+)|(?:under|below) (.+)", re.I), "<"),
    (re.compile(r"(?:strictly )?(?:more|greater|larger|bigger|higher) than (?!or)(.+)|(?:over|above) (.+)", re.I), ">"),
    (
        re.compile(
            r"(?:at most|no more than|not more than|up to|a? ?maximum of|less than or equal to) (.+)"
            r"|(.+?) (?:or|at|and) (?:less|fewer|lower|most|below|under|smaller)",
            re.I,
        ),
        "<=",
    ),
    (
        re.compile(
            r"(?:at least|no (?:less|fewer) than|not (?:less|fewer) than|a? ?minimum of|greater than or equal to) (.+)"
            r"|(.+?) (?:or|at|and) (?:more|greater|higher|least|above|over|larger)",
            re.I,
        ),
        ">=",
    ),
    (
        re.compile(
            r"(?:about|approximately|approx\.?|roughly|around|nearly|almost|circa|close to|~) ?(.+)"
            r"|(.+?) (?:approximately|approx\.?|roughly)",
            re.I,
        ),
        "~",
    ),
    (re.compile(r"(?:not equal to|not|anything (?:but|except)|all (?:but|except)|except(?: for)?) (.+)", re.I), "!="),
]
_PART = re.compile(
    r"\s*(?P<part>\d+(?:\.\d+)?\s*(?:\\text\{\s*)?(?:hours?|hrs?|h|minutes?|mins?|seconds?|secs?|s|days?|weeks?|months?|years?|feet|"
    r"foot|ft|inch(?:es)?|in|yards?|yd|pounds?|lbs?|ounces?|oz|dollars?|cents?|meters?|m|cm|centimeters?|kg|g|grams?)\b(?:\s*,)?\s*\}?)"
    r"\s*(?:,|(?:\\text\{)?\s*and\b\s*\}?)?"
)
_MAX_PARTS = 4
_EXACTLY = re.compile(
    r"(?:(?:is|are)\s+)?(?:(?:exactly|precisely|only|just|equal to|equals|a total of)\s+)?", re.IGNORECASE
)
_RELATION_WORD = re.compile(
    r"(?i)\b(?:less|fewer|smaller|lower|under|below|more|greater|larger|bigger|higher|over|above|most|up|least|maximum|"
    r"minimum|about|approx|approximately|roughly|around|nearly|almost|circa|close|not|no|anything|all|except)\b|~"
)

# --------------------------------------------------------------------------------------------------------------- names
_ATOM = r"(?:\\[A-Za-z]+|[A-Za-z])(?:\s*_\s*(?:\{[^{}]*\}|\\?[A-Za-z]+|\d))?'{0,3}"
_ACCENT = r"\\(?:vec|hat|bar|overline|tilde|widehat|overrightarrow|dot)\s*\{\s*[A-Za-z]{1,3}\s*\}"
_LABEL = r"(?:m\s*)?\\(?:angle|triangle)\s*(?:[A-Za-z]{1,3}|\\[a-z]+)|\|\s*[A-Z]{2}\s*\||\[\s*[A-Z]{3,}\s*\]|[A-Z]{2,}"
_WORD_NAME = r"(?:\\text\{[^{}]*\}|[A-Za-z]{3,}(?:[ -][A-Za-z]+){0,5})(?:\s*_\s*(?:\{[^{}]*\}|\w))?"
_DERIVATIVE = r"\\frac\s*\{\s*d(?:\^\{?\d\}?)?\s*[a-z]\s*\}\s*\{\s*d\s*[a-z](?:\^\{?\d\}?)?\s*\}"
_ARGUMENT = rf"\s*\(\s*(?:{_ATOM}|-?\d+)(?:\s*,\s*(?:{_ATOM}|-?\d+))*\s*\)"
_TUPLE = rf"[(]\s*{_ATOM}(?:\s*,\s*{_ATOM})+\s*[)]"
_NAME = re.compile(
    rf"(?:{_ATOM}|{_ACCENT}|{_LABEL}|{_WORD_NAME}|{_DERIVATIVE})(?:\s*\^\s*\{{?\s*-1\s*\}}?(?={_ARGUMENT}))?(?:{_ARGUMENT})?"
    rf"|(?:[PE]|\\Pr|Var|\\text\{{[^{{}}]*\}})\s*(?:\([^()]*\)|\[[^\[\]]*\])|{_TUPLE}"
)
_NO_NAMES = re.compile(
    r"\\(?:pi|infty|emptyset|sin|cos|tan|sec|csc|cot|log|ln|exp|arc\w+|sqrt|frac|pm|mp|cdot|ldots|gcd|max|min|det)(?![A-Za-z])"
    r"|[ei]$"
)
_CONDITION = re.compile(
    r"(?:(?:where|for|with|if)\s+)?(?:(?:any|all|some|every)\s+)?(?:integers?\s+)?\w+\s*\\in\s*\\mathbb\{\w\}.*"
)
_SET_BUILDER = re.compile(
    r"(?P<variable>[a-zA-Z])\s*(?:\\in\s*\\mathbb\{\w\}\s*)?(?:\||\\mid(?![A-Za-z])|:)\s*(?P<relation>.+)"
)

_SET_OF_EXPRESSIONS = re.compile(
    r"(?P<expression>[^|:,]+?)\s*(?:\||\\mid(?![A-Za-z])|:)\s*(?P<condition>\w+\s*\\in\s*\\mathbb\{\w\}[^,]*)"
)
_CONDITION_BEHIND = re.compile(r"(?P<expression>.+?)\s*\(\s*(?P<condition>\w+\s*\\in\s*\\mathbb\{\w\}[^(),]*)\)")

# --------------------------------------------------------------------------------------------------------------- words
_LETTERS = re.compile(r"[A-Za-z]+(?:(?:\s+|['-])[A-Za-z]+)*[.!?]?")
_CAPITALS = re.compile(r"[A-Z]{2}")
_TWO_LETTER_WORDS = frozenset(
    [
        "ad",
        "ah",
        "am",
        "an",
        "as",
        "at",
        "ax",
        "be",
        "by",
        "do",
        "ex",
        "go",
        "ha",
        "he",
        "hi",
        "id",
        "if",
        "in",
        "is",
        "it",
        "me",
        "my",
        "no",
        "of",
        "oh",
        "ok",
        "on",
        "or",
        "ox",
        "pa",
        "so",
        "to",
        "up",
        "us",
        "we",
    ]
)
_TAIL_START = re.compile(
    r"\s*\\text\{|\s*\\p?mod(?![A-Za-z])|\s*\\?%|\s*\^\{\\circ\}|\s+(?=[A-Za-z])|\s*[€£¥₹]|\s*\\\$|(?<=[\d}])(?=(?:cm|km|mm|kg|mg)\b)"
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|sec|csc|cot)(?![A-Za-z])")
_RATIO_SIGN = re.compile(r":|to|\\text\{\s*to\s*\}")
_EITHER_SIGN = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_OPEN_END = re.compile(r"(?:[-+*/^=(_,<>]|\\(?:cdot|times|div|pm|mp|frac|sqrt))\s*$")
_CURRENCY_FIRST = re.compile(rf"(?:{CURRENCY})\s*")


def read(text: str) -> Reading:
    """Parse a cleaned answer (`math_text.cleaned`)."""
    return _read(text, 0)


@lru_cache(maxsize=8192)
def _read(text: str, depth: int) -> Reading:
    if depth > MAX_DEPTH:
        return Words(normalised_words(text))
    reading: Reading | None = read_clock_time(text) or read_numeral(text) or _quantity_of_number(text)
    reading = reading or _choice(text, depth) or _of_parts(text, depth)
    for attempt in (_exactly, _relation_in_words, _several, _bracketed, _relation, _union, _ratio):
        reading = reading or attempt(text, depth)
    if reading is not None:
        return reading
    return _words(text) or _quantity(text)


def _of_parts(text: str, depth: int) -> Several | None:
    """Read one quantity in several units: "2 hours and 30 minutes". Two numbers of the same unit are two quantities."""
    parts: list[str] = []
    position = 0
    while position < len(text):
        part = _PART.match(text, position)
        if part is None or len(parts) > _MAX_PARTS:
            return None
        parts.append(re.sub(r"(?<=\d)(?=[a-z])", " ", part["part"]))
        position = part.end()
    readings = tuple(_read(part.strip(), depth + 1) for part in parts)
    units = {str(reading.unit) for reading in readings if isinstance(reading, Quantity)}
    return Several(readings, "", "+") if len(parts) > 1 and len(units) == len(parts) else None


def _quantity_of_number(text: str) -> Quantity | None:
    number = read_plain_number(text)
    return None if number is None else Quantity(text, number.value, number.percent, number.unit, text)


def _choice(text: str, depth: int) -> Choice | None:
    found = split_choice(text)
    if found is None:
        return None
    letter, content, certain = found
    if not content and not certain:
        return Choice(letter, None, text)
    return Choice(letter, _read(content, depth + 1) if content else None, text)


def _exactly(text: str, depth: int) -> Reading | None:
    """Read an answer without words that add nothing: "exactly 12" and "equal to 12" are 12."""
    plain = re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r" \1 ", text).strip() if "\\text" in text[:6] else text
    match = _EXACTLY.match(plain)
    rest = plain[match.end() :] if match else ""
    return _read(rest, depth + 1) if rest and rest != plain else None


def _relation_in_words(text: str, depth: int) -> Relation | None:
    if not _RELATION_WORD.search(text):
        return None
    plain = re.sub(r"\\text\{\s*([^{}]*?)\s*\}", r" \1 ", text).strip()
    plain = " ".join(plain.split())
    for pattern, operator in _IN_WORDS:
        match = pattern.fullmatch(plain)
        content = (match[1] or match[2]).strip() if match else ""
        if content and not _LETTERS.fullmatch(content):
            return Relation((Member("", ""), Member(content, "")), (operator,))
    return None


def _several(text: str, depth: int) -> Several | None:
    r"""Read a bare list: members between commas, semicolons, "and", "or", \lor, \to … outside all brackets."""
    tokens = [token for token in top_level(text) if token[0] in _JOINERS]
    tokens = _without_thousands(text, tokens)
    behind = _CONDITION_BEHIND.fullmatch(text) if not tokens else None
    if behind is not None:
        return _several(f"{behind['expression']}, {behind['condition']}", depth)
    if not tokens or len(tokens) > MAX_ITEMS:
        return None
    items = [item for item in split_at(text, tokens) if item]
    joiners = {_JOINERS[token[0]] for token in tokens}
    condition = ""
    if len(items) > 1 and _CONDITION.fullmatch(items[-1]):
        condition = "".join(items.pop().split())
    if len(items) > 1 and items[0].startswith((r"\forall", r"\text{for all", r"\text{For all")):
        condition = "".join(items.pop(0).split())
    if len(items) == 1 and not condition:
        return None
    joiner = "->" if "->" in joiners else next((word for word in ("or", "and") if word in joiners), ",")
    return Several(_items(items, depth), "", joiner, condition)


def _items(texts: list[str], depth: int) -> tuple[Reading, ...]:
    r"""Read a collection's members; "\pm a" gives two."""
    readings: list[Reading] = []
    for text in texts:
        if text.strip() in (r"\ldots", r"\ldots."):
            readings.append(Dots())
            continue
        reading = _read(text, depth + 1)
        readings.extend(reading.items if isinstance(reading, Several) and reading.joiner == "+-" else [reading])
    return tuple(readings)


def _without_thousands(text: str, tokens: list[re.Match[str]]) -> list[re.Match[str]]:
    """The separators without thousands commas, if other commas are followed by a space: "1,234, 5,678"."""
    commas = [token for token in tokens if token[0] == ","]
    if not any(text[token.end() : token.end() + 1] == " " for token in commas):
        return tokens
    grouped = {match.start(1) for match in re.finditer(r"(?<=\d)(,)(?=\d{3}(?!\d))", text)}
    return [token for token in tokens if token.start() not in grouped]


def _bracketed(text: str, depth: int) -> Reading | None:
    found = in_brackets(text)
    if found is None:
        return None
    kind, inner = found
    if text[0] == "{" and not any(token[0] in ",;" for token in top_level(inner)):
        return _read(inner, depth + 1)  # braces of LaTeX that show nothing
    separators = _without_thousands(inner, [token for token in top_level(inner) if token[0] in (",", ";")])
    if len(separators) > MAX_ITEMS:
        return None
    texts = [item for item in split_at(inner, separators) if item]
    if len(texts) > 1 or kind == "{}":
        builder = _SET_BUILDER.fullmatch(inner) if kind == "{}" else None
        if builder is not None:
            return _read(builder["relation"], depth + 1)
        members = _SET_OF_EXPRESSIONS.fullmatch(inner) if kind == "{}" else None
        if members is not None:
            return _read(f"{members['expression']}, {members['condition']}", depth + 1)
        return Several(_items(texts, depth), kind)
    if kind in ("()", "[]") and inner:
        return _read(inner, depth + 1)
    return None


def _relation(text: str, depth: int) -> Reading | None:
    tokens = [token for token in top_level(text) if token[0] in _OPERATORS]
    if not tokens or len(tokens) > MAX_ITEMS:
        return None
    members = split_at(text, tokens)
    operators = [_OPERATORS[token[0]] for token in tokens]
    if not members[-1] or any(not member for member in members[1:]):
        return Words(normalised_words(text))
    if operators[0] == "=" and not members[0]:  # "= 5"
        members, operators = members[1:], operators[1:]
        if not operators:
            return _read(members[0], depth + 1)
    return Relation(tuple(Member(member, _name(member)) for member in members), tuple(operators))


def _name(text: str) -> str:
    """A normalized name, if the text names a variable, a function's value or a thing in words; else ""."""
    if not _NAME.fullmatch(text) or _NO_NAMES.match(text):
        return ""
    return re.sub(r"[\s{}]|\\text", "", text)


def _union(text: str, depth: int) -> Union | None:
    tokens = [
        token
        for token in top_level(text)
        if token[0] == r"\cup" or (token[0] == "U" and in_brackets(text[: token.start()].strip()))
    ]
    if not tokens or len(tokens) > MAX_ITEMS:
        return None
    return Union(tuple(_read(part, depth + 1) for part in split_at(text, tokens)))


def _ratio(text: str, depth: int) -> Ratio | None:
    tokens = [token for token in top_level(text) if _RATIO_SIGN.fullmatch(token[0])]
    if not tokens or len(tokens) > MAX_ITEMS:
        return None
    parts = split_at(text, tokens)
    readings = [_read(part, depth + 1) if part else None for part in parts]
    found = tuple(part for part in readings if isinstance(part, (Quantity, Choice)))
    return Ratio(found) if len(found) == len(parts) else None


def normalised_words(text: str) -> str:
    r"""Text as it is compared: without \text{…}, in lower case, with single spaces and no full stop at its end."""
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).replace("\\", "")
    return re.sub(r"\s+([,.;:!?)])", r"\1", " ".join(plain.split())).rstrip(".!").lower()


def _words(text: str) -> Words | None:
    r"""Read letters that are words, not a product: three or more, two capitals, a short English word, or \text{…}."""
    unmarked = re.sub(r"\\text\{[^{}]*\}", "", text).strip()
    plain = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip()
    if not _LETTERS.fullmatch(plain) or (unmarked != text and len(unmarked) == 1):
        return None  # a variable with a word beside it stays one
    compact = plain.rstrip(".!?")
    parts = re.split(r"[\s'-]+", compact)
    if (
        not unmarked
        or any(len(part) > 2 or part.lower() in _TWO_LETTER_WORDS for part in parts)
        or _CAPITALS.fullmatch(compact)
    ):
        return Words(normalised_words(text))
    return None


def _quantity(text: str) -> Reading:
    r"""Read an expression and its currency, unit or percent sign; one with \pm gives two readings."""
    if _EITHER_SIGN.search(text):
        both = tuple(
            _read(text.replace(r"\pm", sign).replace(r"\mp", other), 1) for sign, other in (("+", "-"), ("-", "+"))
        )
        return Several(both, "", "+-")
    currency = _CURRENCY_FIRST.match(text)
    expression = text[currency.end() :] if currency else text
    for start in _TAIL_START.finditer(expression):
        head, tail = expression[: start.start()], expression[start.start() :]
        if (
            not head.strip()
            or _OPEN_END.search(head)
            or head.count("{") != head.count("}")
            or head.count("(") != head.count(")")
        ):
            continue
        if not re.search(r"[\dA-Za-z]", head):
            continue
        if re.fullmatch(r"\s+[A-Za-z](?![A-Za-z]).*", tail) and re.search(r"(?<![\\A-Za-z])[A-Za-z]", head):
            continue  # a letter after letters is a factor
        if tail.startswith("^") and _TRIGONOMETRIC.search(head):
            continue  # the sine of 30 degrees, not a number of degrees
        found = read_tail(tail)
        if found is not None and found.scale == 1 and (found.percent or found.unit):
            unit = found.unit if currency is None else read_unit(currency[0].strip() + tail)
            return Quantity(head.strip(), None, found.percent, unit or NO_UNIT, text)
    unit = read_unit(currency[0].strip()) if currency else NO_UNIT
    return Quantity(expression.strip(), None, False, unit or NO_UNIT, text)
