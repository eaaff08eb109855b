r"""Exact equality of expressions: math-verify's parser reads LaTeX, and sympy computes values without floating point.

The parser is latex2sympy2_extended. What it would drop (text, units, bases, relations and unknown commands) is removed
first, or makes the expression opaque; an opaque expression equals only the same text.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.function import AppliedUndef

from megatron_fipo.verifiers.math_text import is_computable

# It warns once per process about settings that are not used here.
logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)

FEWEST_DIGITS = 60
"""Decimal digits to which two expressions are compared, relative to the largest term, if their numbers are small."""

MOST_DIGITS = 6000
"""Decimal digits for the largest numbers: 2^{-5000}, which `is_computable` admits, begins with 1,505 zeros."""

_SPELLING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
)
_CASE_COUNTS = ConversionConfig(lowercase_symbols=False)

_READ_COMMANDS = (
    r"frac sqrt pi cdot times div pm infty binom sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh "
    r"log ln exp lg lfloor rfloor lceil rceil begin end alpha beta gamma delta epsilon varepsilon zeta eta "
    r"theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi varphi chi psi omega Gamma Delta "
    r"Theta Lambda Xi Sigma Upsilon Phi Psi Omega vec hat bar overline sum prod int lim to max min gcd det "
    r"mathbb cup cap setminus emptyset { } \ lvert rvert vert mid "
)
_COMMANDS = frozenset(_READ_COMMANDS.split())
"""Commands that the parser reads correctly; any other makes an expression opaque."""
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_ALLOWED = re.compile(r"[A-Za-z0-9\s+\-*/^_=(){}\[\].,!|&\\]*")
_ENVIRONMENT = re.compile(r"\\begin\s*\{([^{}]*)\}")
_MATRICES = frozenset(["matrix", "pmatrix", "bmatrix", "vmatrix", "Bmatrix", "smallmatrix"])
_UNREADABLE = re.compile(
    r"\d\s*_|(?<![_\d])\d+\s+\d|\d\.\d*\.|^\s*$|\^\s*(?:\{[^{}]*\}|\d+|[A-Za-z])\s*\^|\\mathbb(?!\{[RNZQC]\})"
)
_DECIMAL = re.compile(r"(?<![\d.])(\d*\.\d+|\d+\.(?!\d))(?:\\overline\{(\d+)\})?")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_DEGREES = re.compile(
    r"(\d+(?:\.\d+)?|\\frac\{\d+\}\{\d+\}|(?<![A-Za-z\\])[a-z]|\\(?:theta|alpha|beta))\s*\^\{\\circ\}"
)
_REMAINDER = re.compile(r"^\s*(\d{1,300})\s*\\bmod\s*(\d{1,300})\s*$")
_CIS = re.compile(r"\\cis\s*(\((?:[^()]|\([^()]*\))*\)|\\frac\{[^{}]*\}\{[^{}]*\}|\\?[A-Za-z]+|\d+)")
_LETTERS = {"hbar": "h_{1001}", "ell": "l_{1002}"}
"""Replacements, which nobody writes, for letters that the parser does not know."""
_FUNCTION_OVER = re.compile(
    r"\\(sin|cos|tan|ln|log)\s*((?!\\pi)\\(?:theta|alpha|beta|gamma|phi|varphi|omega)(?![A-Za-z])|[A-Za-z])\s*/(?=\s*[A-Za-z\\])"
)
"""A function of a letter over a letter: \\sin\\theta/g is a quotient, while \\sin\\pi/3 and \\sin x/2 may not be."""
_POINTS = (
    Fraction(7, 5), Fraction(-13, 11), Fraction(23, 7), Fraction(-31, 9), Fraction(5, 13), Fraction(-3, 17),
    Fraction(41, 10), Fraction(-57, 8), Fraction(19, 6),
)  # fmt: skip
_FEWEST_POINTS = 3
"""Smallest number of points with a value at which two expressions must agree; agreement at fewer proves nothing."""

_LARGEST_EXPANDED = 16
"""Largest power of a sum that is multiplied out."""


@lru_cache(maxsize=4096)
def parse(latex: str) -> Any:
    """Parse an expression into a sympy object; None if it is opaque or too large to compute."""
    if not is_computable(latex) or len(latex) > 2000:
        return None
    text = _DEGREES.sub(r"(\\frac{\1 \\pi}{180})", latex)
    text = _spelled_out(text)
    text = re.sub(r"\\log\s*_\s*(\d+)", r"\\log_{\1}", text)
    text = re.sub(r"\^\s*(-\d+|\d{2,})", r"^{\1}", text)
    text = _GROUPED.sub(lambda number: number[0].replace(",", ""), text)
    if _UNREADABLE.search(text) or not _ALLOWED.fullmatch(text):
        return None
    if any(command not in _COMMANDS for command in _COMMAND.findall(text)):
        return None
    if any(environment.rstrip("*") not in _MATRICES for environment in _ENVIRONMENT.findall(text)):
        return None
    text = re.sub(r"\\(?:[lr]vert|vert|mid)(?![A-Za-z])", "|", _DECIMAL.sub(_as_fraction, text))
    try:
        parsed = latex2sympy(
            normalize_latex(text, _SPELLING), is_real=True, conversion_config=_CASE_COUNTS, normalization_config=None
        )
    except Exception:  # noqa: BLE001 - the parser raises whatever its grammar's code comes across
        return None
    value = _evaluated(parsed)
    return _with_real_roots(value) if "\\sqrt" in text and value is not None else value


def _spelled_out(text: str) -> str:
    """Rewrite notation that the parser does not read, or misreads, into notation that it reads."""
    text = re.sub(r"\\lg(?![A-Za-z])\s*", r"\\log_{10} ", text)
    text = re.sub(r"\\(max|min|gcd)\s*\\\{([^{}\\]*)\\\}", r"\\\1(\2)", text)
    text = re.sub(r"(?<![\d.])(\d{1,3})!!(?!!)", lambda odd: str(sympy.factorial2(int(odd[1]))), text)
    text = _REMAINDER.sub(lambda found: str(int(found[1]) % int(found[2])) if int(found[2]) else found[0], text)
    text = _CIS.sub(r"e^{i \1}", text)
    for name, letter in _LETTERS.items():
        text = re.sub(rf"\\{name}(?![A-Za-z])", f" {letter} ", text)
    return _FUNCTION_OVER.sub(r"\\\1(\2)/", text)


def _with_real_roots(value: Any) -> Any:
    """Replace odd roots of negative numbers by the real root, which the root sign means; sympy takes a complex one."""

    def is_odd_root(part: Any) -> bool:
        return (
            part.is_Pow
            and part.exp.is_Rational
            and part.exp.q > 1
            and part.exp.q % 2 == 1
            and part.base.is_negative is True
        )

    if not isinstance(value, sympy.Expr) or not any(map(is_odd_root, value.atoms(sympy.Pow))):
        return value
    return value.replace(is_odd_root, lambda part: (-1) ** part.exp.p * (-part.base) ** part.exp)


def _as_fraction(decimal: re.Match[str]) -> str:
    places = len(decimal[1].partition(".")[2])
    value = Fraction(decimal[1] + ("" if places else "0"))
    if decimal[2]:
        value += Fraction(int(decimal[2]), (10 ** len(decimal[2]) - 1) * 10**places)
    fraction = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    # Braces keep the fraction together under a power or a root; a whole text in braces would be a set.
    return fraction if decimal[0] == decimal.string.strip() else f"{{{fraction}}}"


def _evaluated(parsed: Any) -> Any:
    if not isinstance(parsed, (sympy.Basic, sympy.MatrixBase)):
        return None
    try:
        value = parsed.doit()
        value = value.subs({symbol: sympy.I for symbol in value.free_symbols if str(symbol) in ("i", "\\imath")})
        value = value.doit()
        # A call of an unknown function becomes a variable: f(2x) equals f(x + x), but not f(x).
        return value.subs({call: sympy.Symbol(str(call), real=True) for call in value.atoms(AppliedUndef)})
    except (TypeError, ValueError, ArithmeticError, AttributeError, NotImplementedError, RecursionError):
        return None


def rational(value: Fraction) -> Any:
    """Convert a fraction to a sympy number."""
    return sympy.Rational(value.numerator, value.denominator)


def is_number(value: Any) -> bool:
    """Whether a sympy object is an expression without variables."""
    return isinstance(value, sympy.Expr) and not value.free_symbols


def equal(first: Any, second: Any) -> bool:
    """Whether two sympy objects are equal, for all values of their variables."""
    if first is None or second is None:
        return False
    if isinstance(first, sympy.MatrixBase) or isinstance(second, sympy.MatrixBase):
        if (
            not (isinstance(first, sympy.MatrixBase) and isinstance(second, sympy.MatrixBase))
            or first.shape != second.shape
        ):
            return False
        return all(equal(a, b) for a, b in zip(first.flat(), second.flat(), strict=True))
    if isinstance(first, sympy.Set) or isinstance(second, sympy.Set):
        return isinstance(first, sympy.Set) and isinstance(second, sympy.Set) and equal_sets(first, second)
    if not (isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)):
        return bool(first == second)
    if sympy.nan in (first, second) or sympy.zoo in (first, second):
        return False
    if first == second:
        return True
    if first.is_Rational and second.is_Rational:
        return False
    if not first.is_finite and not second.is_finite and (first.is_infinite or second.is_infinite):
        return False
    return _equal_expressions(first, second)


def equal_sets(first: Any, second: Any) -> bool:
    """Whether two sympy sets have the same members."""
    if first == second:
        return True
    if isinstance(first, sympy.FiniteSet) and isinstance(second, sympy.FiniteSet):
        rest = list(second.args)
        for member in first.args:
            match = next((other for other in rest if equal(member, other)), None)
            if match is None:
                return False
            rest.remove(match)
        return not rest
    return first.symmetric_difference(second).is_empty is True


def equal_up_to_factor(first: Any, second: Any, *, positive: bool = False) -> bool:
    """Whether two expressions differ by a constant factor, as the differences of two equal equations' sides do.

    Args:
        first: an expression.
        second: another expression.
        positive: whether the factor must be positive, as for inequalities.
    """
    if not (isinstance(first, sympy.Expr) and isinstance(second, sympy.Expr)):
        return False
    if not positive:
        first, second = (sympy.fraction(sympy.together(side))[0] for side in (first, second))
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    if not symbols:
        return False
    # A point other than those of the comparison below, at which the choice of the factor would make them agree.
    aside = Fraction(1, 29)
    point = {symbol: rational(_POINTS[index % len(_POINTS)] + index + aside) for index, symbol in enumerate(symbols)}
    at_first, at_second = first.subs(point), second.subs(point)
    if equal(at_first, sympy.Integer(0)) or equal(at_second, sympy.Integer(0)):
        return equal(first, second)
    factor = at_first / at_second
    if positive and not (factor.is_positive or sympy.N(factor, 30) > 0):
        return False
    return equal(first, second * factor)


def _equal_expressions(first: Any, second: Any) -> bool:
    """Whether two expressions agree at all points of their variables, to as many digits as their numbers require."""
    symbols = sorted(first.free_symbols | second.free_symbols, key=str)
    points = [
        {symbol: rational(_POINTS[(start + index) % len(_POINTS)] + index) for index, symbol in enumerate(symbols)}
        for start in range(len(_POINTS) if symbols else 1)
    ]
    found = [_differ_at(first, second, point, FEWEST_DIGITS) for point in points]
    if True in found:
        return False
    if symbols and expanded(first - second).is_zero:
        return True
    compared = [point for point, differ in zip(points, found, strict=True) if differ is False]
    if len(compared) < (_FEWEST_POINTS if symbols else 1):
        return bool(sympy.simplify(first - second).is_zero)
    digits = _digits_demanded(first, second)
    return digits == FEWEST_DIGITS or not any(_differ_at(first, second, point, digits) for point in compared[:2])


def _digits_demanded(*values: Any) -> int:
    """Number of digits to which expressions are compared: those of their whole numbers and, at most, their powers."""
    digits = FEWEST_DIGITS
    for value in values:
        for number in value.atoms(sympy.Rational):
            digits += (int(number.p).bit_length() + int(number.q).bit_length()) // 3 - 1
        for power in value.atoms(sympy.Pow, sympy.exp):
            exponent = power.exp if isinstance(power, sympy.Pow) else power.args[0]
            if exponent.is_Rational:
                digits += int(abs(exponent))
    return min(digits, MOST_DIGITS)


def expanded(value: Any) -> Any:
    """Multiply out an expression, unless the result would be long."""
    exponents = [abs(power.exp) for power in value.atoms(sympy.Pow) if power.exp.is_Integer and not power.base.is_Atom]
    if max(exponents, default=0) > _LARGEST_EXPANDED or value.count_ops() > _LARGEST_EXPANDED**2:
        return value
    return sympy.expand(value)


def _differ_at(first: Any, second: Any, point: dict[Any, Any], digits: int) -> bool | None:
    """Whether two expressions differ at a point; None if a term has no value there."""
    terms = [(sign, term) for sign, side in ((1, first), (-1, second)) for term in sympy.Add.make_args(side)]
    total, largest = sympy.Integer(0), sympy.Integer(0)
    for sign, term in terms:
        value = term.subs(point).evalf(digits + 10)
        parts = value.as_real_imag()
        if not all(part.is_Float or part.is_Rational for part in parts):
            return None
        total += sign * value
        largest = max(largest, *(abs(part) for part in parts))
    real, imaginary = total.as_real_imag()
    bound = largest * sympy.Rational(1, 10**digits)
    return bool(abs(real) > bound or abs(imaginary) > bound)
