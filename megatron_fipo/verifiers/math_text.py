r"""Answers as text: one spelling for LaTeX, Markdown and Unicode, and a check of what is too large to compute."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable

from megatron_fipo.verifiers.answers.unicode_text import argument_end, as_latex

MAX_DEPTH = 24
"""Deepest nesting of brackets in an answer."""

MAX_EXPONENT = 5000
"""Largest exponent, argument of a factorial, and upper index of a binomial coefficient."""

MAX_POWER_OF_POWERS = 200_000
"""Largest product of the exponents of nested powers, as in (2^{100})^{200}."""

_MAX_UNWRAPPED = 200
"""Number of commands of one kind that are removed from an answer; further ones stay."""

# ----------------------------------------------------------------------------------- commands that only change the look
_EMPHASIS = re.compile(
    r"\\(?:boldsymbol|bm|bold|mathbold|pmb|mathbf|mathit|mathsf|mathnormal|mathtt|mathopen|mathclose|underline|uline|ensuremath|"
    r"displaymath|boxed|fbox|framebox|bbox\s*(?:\[[^\]]*\])?|colorbox\s*\{[^{}]*\}|(?:text)?color\s*(?:\[[^\]]*\])?\{[^{}]*\})\s*(?=\{)"
)
_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt|up|md|sl|normal)?|mathrm|mbox|hbox|emph|operatorname\*?)\s*(?=\{)")
_DROPPED = re.compile(
    r"\\(?:left|right)\s*\.(?!\d)"
    r"|\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|scriptstyle|limits|nolimits|tiny|small|normalsize|"
    r"large|Large|LARGE|huge|Huge|bf|rm|it|bfseries|itshape|boldmath|unboldmath|centering|noindent|hfill)(?![A-Za-z])"
    r"|\\(?:mathbf|mathrm|mathit|mathsf|boldsymbol|bm)\s+(?=[A-Za-z0-9](?![A-Za-z]))"
    r"|\\(?:text)?color\s*(?:\[[^\]]*\])?\{[^{}]*\}|\\(?:hspace|vspace|label|tag|phantom)\*?\s*\{[^{}]*\}"
)
_SPACES = re.compile(r"(?<!\\)\\[,;:> ]|~|\\(?:q?quad|thinspace|enspace|space)(?![A-Za-z])|\s+")
_INLINE_MATHS = re.compile(r"(?<![\\\d])\$(?=\S)([^$]*?[^\s$\\])\$(?!\d)")
_BRACKETED_MATHS = re.compile(r"(?<!\\)\\[()]|(?<!\\)\\[\[\]]")
_TAGS = re.compile(r"</?(?:answer|think)>|<br ?/?>", re.IGNORECASE)
_HTML = re.compile(r"<(b|strong|i|em|u|p|span|code|mark|big|center)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_HTML_SCRIPT = re.compile(r"<su([bp])>(.{1,40}?)</su\1>", re.IGNORECASE)
_BOLD = (
    re.compile(r"(?<![\w)\]}*])\*\*(?=[^\s*])(.+?)(?<=[^\s*])\*\*(?![\w(\[{\\*])"),
    re.compile(r"(?<![\w)\]}])__(?=[^\s_])(.+?)(?<=[^\s_])__(?![\w{])"),
)
_WRAPPERS = (
    ("$$", "$$"), ("$", "$"), ("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"),
    ("``", "''"), ("``", "``"),
)  # fmt: skip
_TILDE_FIRST = re.compile(r"^[$*\s]{0,4}~\s*(?=[\d.$])")  # "~5" is about 5; elsewhere it is LaTeX's space
_FENCE = re.compile(r"```(?:[a-z]{0,8}\s+)?([^`]*?)\s*```", re.DOTALL)
_ENTITY = re.compile(r"&(?:#\d{1,6}|#x[0-9a-f]{1,5}|[a-z]{2,7}\d{0,2});", re.IGNORECASE)
_ARRAY = re.compile(r"([(\[|]?)\s*\\begin\s*\{array\}\s*\{[^{}]*\}(.*?)\\end\s*\{array\}\s*([)\]|]?)", re.DOTALL)
_ALIGNMENT_MARK = re.compile(r"(?<!\\)&")
_ALIGNED = re.compile(
    r"\\begin\s*\{(aligned|align|alignat|alignedat|equation|gather|gathered|split|multline|displaymath|math|eqnarray)(\*?)\}"
    r"(.*?)\\end\s*\{\1\2\}",
    re.DOTALL,
)
"""Environments that only lay out a formula and do not change its meaning."""

# ---------------------------------------------------------------------------------------------------- one name for each
_NAMES = [
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![A-Za-z])"), r"\\binom"),
    (re.compile(r"\\(?:leqslant|leq|leqq)(?![A-Za-z])|<="), r"\\le "),
    (re.compile(r"\\(?:geqslant|geq|geqq)(?![A-Za-z])|>="), r"\\ge "),
    (re.compile(r"\\(?:neq|not\s*=)|(?<=[A-Za-z\s])!="), r"\\ne "),
    (re.compile(r"\{?\s*([^{}\\]{1,40}?)\s*\\choose(?![A-Za-z])\s*([^{}\\]{1,40}?)\s*(?:\}|$)"), r"\\binom{\1}{\2}"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\(?:approxeq|simeq|thickapprox|cong|doteq)(?![A-Za-z])|~="), r"\\approx "),
    (re.compile(r"\\(?:rightarrow|longrightarrow)(?![A-Za-z])|->"), r"\\to "),
    (re.compile(r"\\(?:varnothing|emptyset)(?![A-Za-z])|\\\{\s*\\\}"), r"\\emptyset "),
    (re.compile(r"\\(?:dots[cbmio]?|cdots|ldots)(?![A-Za-z])|\.{3,}"), r"\\ldots "),
    (re.compile(r"\\(?:lbrace)(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\(?:rbrace)(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\imath(?![A-Za-z])|\\mathrm\{i\}"), "i"),
    (re.compile(r"\\(?:exp|mathrm)\s*\{([eid])\}"), r"\1"),
    (re.compile(r"(?<=\d)\{:\}(?=\d)"), ":"),
    (re.compile(r"\+/-|\+-(?=\d)"), r"\\pm "),
    (re.compile(r"\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])"), r"^{\\circ}"),
    (re.compile(r"(?<![\\A-Za-z])infinity\b", re.IGNORECASE), r"\\infty "),
    (re.compile(r"(?<![\\A-Za-z])(?:negative|minus) (?=\d|\\frac|\\sqrt)", re.IGNORECASE), "-"),
    (re.compile(r"\\colon(?![A-Za-z])"), ":"),
    (
        re.compile(r"(?<![\\A-Za-z{])(pi|(?:arc)?(?:sin|cos|tan)|sec|csc|cot|log|ln|exp|theta|alpha|beta)(?![A-Za-z])"),
        r"\\\1 ",
    ),
]
_DOUBLE_STAR = re.compile(r"(?<=[\w)}\]])\s*\*\*\s*(?=[\w({\\-])")
_ASCII_ROOT = re.compile(r"(?<![\\A-Za-z])(sqrt|cbrt)\s*(?=[(\d])")
_CONNECTIVE = re.compile(r"[\s,;]*(?:and|or|but|,|;|&)[\s,]*", re.IGNORECASE)
_OPERATORS = frozenset(
    [
        "arcsin",
        "arccos",
        "arctan",
        "sin",
        "cos",
        "tan",
        "sec",
        "csc",
        "cot",
        "log",
        "ln",
        "exp",
        "det",
        "gcd",
        "max",
        "min",
        "sinh",
        "cosh",
        "tanh",
        "cis",
    ]
)
_REPEATING = re.compile(r"(?<=[\d.])\s*\\(?:overline|bar|overbar|dot)\s*(?:\{(\d+)\}|(\d))")
_DOTTED_PERIOD = re.compile(r"\\dot\{(\d)\}(\d*)\\dot\{(\d)\}")

# ------------------------------------------------------------------------------------------------------------- numerals
_LATEX_THOUSANDS = re.compile(r"(?<=\d)(?:\\!\s*,\s*\\!|\{,\}|,\s*\\!\s*|\\!\s*,\s*)(?=\d{3}(?!\d))")
_LATEX_DECIMAL_COMMA = re.compile(r"(?<=\d)\{,\}(?=\d)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,^_}/])(\d{1,3})((?: \d{3})+)(?![\d/]|\s*/| \d|\s*\\frac)")
_SMALL_SPACES = re.compile(r"(?<=\d)\\[,;:](?=\d{3}(?!\d))")
_TRAILING = re.compile(r"(?:\s|\\\\)*[,;:](?:\s|\\\\)*$|\s*(?<!\.)\.\s*$|\s*\\\\\s*$")


def cleaned(answer: str) -> str:
    """Remove what only affects an answer's look, and bring its LaTeX, Markdown and Unicode to one spelling."""
    if answer.isascii() and answer.isdigit():
        return answer
    if "&" in answer:
        answer = _ENTITY.sub(lambda entity: html.unescape(entity[0]), answer)
    text = _TILDE_FIRST.sub(r"\\sim ", _TAGS.sub(" ", as_latex(answer)).strip())
    if "</" in text:
        text = _HTML_SCRIPT.sub(lambda script: f"{'^' if script[1] in 'pP' else '_'}{{{script[2]}}}", text)
        text = _HTML.sub(r" \2 ", text)
    fenced = _FENCE.fullmatch(text)
    text = _unwrapped(fenced[1] if fenced else text)
    if "**" in text or "__" in text:
        for pattern in _BOLD:
            text = pattern.sub(r"\1", text)
    if "\\" in text:
        text = _without_commands(text)
    text = _SPACES.sub(" ", text)
    text = _SPACED_THOUSANDS.sub(lambda number: number[1] + number[2].replace(" ", ""), text)
    text = _unwrapped(_INLINE_MATHS.sub(r" \1 ", text.replace("$$", " ") if text.count("$$") > 1 else text))
    return _unwrapped(" ".join(_named(text).split()))


def _without_commands(text: str) -> str:
    if "\\begin" in text:
        text = _ALIGNED.sub(lambda environment: f" {_ALIGNMENT_MARK.sub(' ', environment[3])} ", text)
    text = _LATEX_THOUSANDS.sub("", _SMALL_SPACES.sub("", text))
    text = _LATEX_DECIMAL_COMMA.sub(".", text).replace("\\!", "")
    text = _BRACKETED_MATHS.sub(" ", text)
    text = _replaced(text, _EMPHASIS, lambda content: content)
    text = _DROPPED.sub(" ", text)
    if "array" in text:
        text = _ARRAY.sub(_as_matrix, text)
    text = _replaced(text, _TEXT, _text_content)
    if "\\dot" in text:
        text = _DOTTED_PERIOD.sub(r"\\overline{\1\2\3}", text)
    return _REPEATING.sub(lambda digits: rf"\overline{{{digits[1] or digits[2]}}}", text)


def _as_matrix(array: re.Match[str]) -> str:
    """Turn an array in brackets into a matrix; unwrap one of a single column without brackets, which is only layout."""
    if array[1] and array[3]:
        matrix = "vmatrix" if array[1] == "|" else "pmatrix"
        return rf"\begin{{{matrix}}}{array[2]}\end{{{matrix}}}"
    return array[0] if _ALIGNMENT_MARK.search(array[2]) else f"{array[1]} {array[2]} {array[3]}"


def _named(text: str) -> str:
    if "**" in text:
        text = _DOUBLE_STAR.sub("^", text)
    root = _ASCII_ROOT.search(text)
    for _ in range(_MAX_UNWRAPPED):
        if root is None:
            break
        end = argument_end(text, root.end())
        argument = (
            text[root.end() : end].removeprefix("(").removesuffix(")")
            if text[root.end()] == "("
            else text[root.end() : end]
        )
        text = f"{text[: root.start()]}\\sqrt{'[3]' if root[1] == 'cbrt' else ''}{{{argument}}}{text[end:]}"
        root = _ASCII_ROOT.search(text)
    for pattern, replacement in _NAMES:
        text = pattern.sub(replacement, text)
    return text


def _text_content(content: str) -> str:
    r"""Replacement of \text{…}: words stay in it; connectives ("and"), functions and what is no word are unwrapped."""
    inner = _TEXT.sub("", content).replace("{", "").replace("}", "").replace("~", " ")
    if _CONNECTIVE.fullmatch(inner):
        return f" {inner.strip()} "
    if inner.strip() in _OPERATORS:
        return f"\\{inner.strip()} "
    if not any(character.isalpha() for character in re.sub(r"\\[A-Za-z]+", "", inner)) or inner in {"e", "i", "d"}:
        return inner
    return rf"\text{{{inner}}}"


def _replaced(text: str, command: re.Pattern[str], content_of: Callable[[str], str]) -> str:
    """Replace each command and its argument in braces by `content_of` of the argument."""
    position = 0
    for _ in range(_MAX_UNWRAPPED):
        found = command.search(text, position)
        if found is None:
            return text
        end = argument_end(text, found.end())
        if text[end - 1] != "}":
            return text
        replacement = content_of(text[found.end() + 1 : end - 1])
        # Search the replacement again, since emphasis may be nested; but not a \text that stays.
        position = found.start() + (len(replacement) if replacement.startswith("\\text") else 0)
        text = text[: found.start()] + replacement + text[end:]
    return text


def _unwrapped(text: str) -> str:
    r"""Strip what surrounds the whole text: dollars, stars, quotes, braces, \text{…}, and punctuation at its end."""
    before = None
    while text != before:
        before = text = text.strip()
        if not text:
            break
        if text[-1] in ".,;:\\" and not text.endswith("..") and not text.endswith(r"\,"):
            text = _TRAILING.sub("", text)
        for left, right in _WRAPPERS:
            if text.startswith(left) and text.endswith(right) and len(text) > len(left) + len(right):
                inner = text[len(left) : -len(right)]
                others = inner.replace("\\$", "") if left == "$" else inner  # a dollar sign is a currency
                if left not in others and not (left == "$" and inner.endswith("\\")):
                    text = inner.strip()
        text = text.rstrip("_")  # the second half of a pair whose first half precedes the answer's marker
        if text.endswith("**") and text.count("**") == 1:
            text = text[:-2]
        if (
            text.startswith("{")
            and argument_end(text, 0) == len(text)
            and text.endswith("}")
            and not _separates(text[1:-1])
        ):
            text = text[1:-1]
        if text.startswith(r"\text{") and argument_end(text, 5) == len(text) and text.endswith("}"):
            text = text[6:-1]
    return text


def _separates(inner: str) -> bool:
    depth = 0
    for character in inner:
        depth += (character in "([{") - (character in ")]}")
        if character in ",;" and depth == 0:
            return True
    return False


_TEXT_MARK = re.compile(r"\\text\{([^{}]*)\}")
_LONE_SCRIPT = re.compile(r"([_^])\{(\w)\}")
_LOOSE_SPACE = re.compile(r"(?<![\w,]) | (?!\w)|(?<=,) (?!\d)|(?<=[A-Za-z]) (?=\d)|(?<=\d) (?=[A-Za-z])")


def without_layout(text: str) -> str:
    r"""Remove from a cleaned answer \text{...} and all spaces but those between digits or between words.

    Equal results are the same answer, of whatever kind; "2 1/2" is not "21/2".
    """
    return _LONE_SCRIPT.sub(r"\1\2", _LOOSE_SPACE.sub("", _TEXT_MARK.sub(r" \1 ", text).strip()))


# ---------------------------------------------------------------------------------------------------- what is too large
_EXPONENT = re.compile(r"([)}]?)\s*\^[\s{(]*[+-]?\s*(\d+)")
_POWER_IN_EXPONENT = re.compile(r"\^[\s{(]*(?=(\d+)\s*\^[\s{(]*(\d+))")
_FACTORIAL_OR_BINOMIAL = re.compile(r"(\d+)\s*!|\\d?binom\s*\{\s*(\d+)")


def is_computable(text: str) -> bool:
    """Whether an answer is safe for computer algebra: no huge power, factorial or binomial, and no deep nesting."""
    depth = deepest = 0
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        deepest = max(deepest, depth)
    if deepest > MAX_DEPTH:
        return False
    powers = text.replace("**", "^")
    arguments = _capped(left or right for left, right in _FACTORIAL_OR_BINOMIAL.findall(powers))
    found = _EXPONENT.findall(powers)
    exponents = _capped(digits for bracket, digits in found if not bracket)
    exponents_of_brackets = _capped(digits for bracket, digits in found if bracket)
    towers = [base ** min(exponent, 99) for base, exponent in map(_capped, _POWER_IN_EXPONENT.findall(powers))]
    if any(number > MAX_EXPONENT for number in (*arguments, *exponents, *exponents_of_brackets, *towers)):
        return False
    return math.prod(exponents_of_brackets) * max(exponents, default=1) <= MAX_POWER_OF_POWERS


def _capped(numbers: Iterable[str]) -> list[int]:
    """Numbers as integers; those with more than six digits count as a million."""
    return [int(digits) if len(digits) <= 6 else 10**6 for digits in numbers]
