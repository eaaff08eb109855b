"""A limit on the size of sympy's exact numbers anywhere in a computation.

`math_text.is_computable` rejects texts with large numbers beforehand, but "(10!)!" and "10^{500 * 500 * 500}" contain
none. The CPU limit would stop these, too, but only after seconds, and on a busy machine after many.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sympy import Integer, Rational, binomial, factorial

MAX_BITS = 2_000_000
"""Largest size of a power in bits, about 600,000 digits. 2^{4000!} still equals 2^{4000!}, since texts are compared
first."""

MAX_FACTORIAL = 20_000
"""Largest argument of a factorial, and largest min(k, n - k) of a binomial coefficient."""


class TooLargeError(BaseException):
    """A number would be too large. It is no Exception, so that a library's `except Exception` does not swallow it."""


@contextlib.contextmanager
def size_limit() -> Iterator[None]:
    """Raise TooLargeError inside the block if a power, factorial or binomial of exact numbers would be too large.

    It wraps sympy's evaluation of these during the block. Nesting is not supported.

    Raises:
        TooLargeError: if a number would be too large.
    """
    power, rational_power = Integer._eval_power, Rational._eval_power
    factorial_of, binomial_of = factorial.eval, binomial._eval

    def checked_power(base: Any, exponent: Any) -> Any:
        _check_power(base, exponent)
        return power(base, exponent)

    def checked_rational_power(base: Any, exponent: Any) -> Any:
        _check_power(base, exponent)
        return rational_power(base, exponent)

    def checked_factorial(cls: Any, n: Any) -> Any:
        _check_argument(n)
        return factorial_of(n)

    def checked_binomial(self: Any, n: Any, k: Any) -> Any:
        _check_argument(min(k, n - k) if n.is_Integer and k.is_Integer and n > 0 else k)
        return binomial_of.__func__(self, n, k)

    Integer._eval_power, Rational._eval_power = checked_power, checked_rational_power
    factorial.eval, binomial._eval = classmethod(checked_factorial), classmethod(checked_binomial)
    try:
        yield
    finally:
        Integer._eval_power, Rational._eval_power = power, rational_power
        factorial.eval, binomial._eval = factorial_of, binomial_of


def _check_power(base: Any, exponent: Any) -> None:
    if not isinstance(exponent, Rational):
        return
    bits = max(int(base.p).bit_length(), int(base.q).bit_length())
    if bits > 1 and bits * abs(int(exponent.p)) > MAX_BITS * int(exponent.q):  # the powers of 1 and -1 stay small
        raise TooLargeError


def _check_argument(number: Any) -> None:
    if isinstance(number, Rational) and abs(number.p) > MAX_FACTORIAL * number.q:
        raise TooLargeError
