"""A block of code in which text becomes Python only if it is an expression of numbers, names and mathematics.

    with expressions_only():
        score = dataset.score_answer(answer, entry)

Libraries that read mathematics do it with `eval` (sympy's parse_expr, many scorers of reasoning-gym). What a model
writes as its answer is data: a list, a number, a formula. So whatever `eval`, `exec` or `compile` is asked to read
inside the block is looked at first, by an audit hook, whoever calls them; attributes, subscripts, statements, functions
of its own, and names of Python's that are no mathematics are refused. Without this a response could not leave its
process (`forked_judge`), but could have its own answer accepted there.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import math
import os
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeGuard

MAX_EXPONENT = 5000
"""Largest number that a power may have as its exponent; beyond, one answer takes for ever."""

_NODES = (
    ast.Expression, ast.Constant, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.Tuple, ast.List, ast.Set,
    ast.Dict, ast.Name, ast.Load, ast.Call, ast.keyword, ast.unaryop, ast.operator, ast.boolop, ast.cmpop,
)  # fmt: skip
_MATHEMATICS = frozenset(
    ("abs", "bool", "complex", "divmod", "float", "int", "len", "max", "min", "pow", "range", "round", "sum")
)
_COMPUTING = frozenset(("builtins.id", "object.__getattr__", "sys._getframe"))
"""Audit events that computing may raise. One that is missing here costs a fork, no more."""
_SYMPYS_OWN = "from sympy import *"
"""How parse_expr fills the names that it reads an expression with; harmless, whoever writes it."""
_REFUSED_NAMES = frozenset(dir(builtins)) - _MATHEMATICS

_MAKERS_OF_NUMBERS = frozenset(("Integer", "Float", "Rational"))
"""What sympy's parser puts around a number."""


class NotAnExpressionError(ValueError):
    """Text was to be read as Python that is no expression of the harmless kind."""


class Watch:
    """Whether anything in a block of `no_code` tried to run text, or to do more than compute."""

    tripped = False


class _State(threading.local):
    block: FrameType | None = None
    """The function that the block is in; None outside."""
    looking = False
    watch: Watch | None = None
    """What `no_code` notes; None outside."""


_state = _State()
_hooked = False


@contextlib.contextmanager
def expressions_only() -> Iterator[None]:
    """Refuse, in this thread, to read text as anything but a harmless expression.

    Raises:
        NotAnExpressionError: out of whatever call tried, which may well be caught before it comes here.
    """
    _hook()
    before, _state.block = _state.block, sys._getframe(2)  # past this function and contextlib's
    try:
        yield
    finally:
        _state.block = before


@contextlib.contextmanager
def no_code() -> Iterator[Watch]:
    """Refuse, in this thread, whatever is more than computing: to run text, to import, to open, to start, to call out.

    Python announces all of that to audit hooks. Whoever tried may swallow the exception, so that what the block came to
    counts only if the watch has not tripped.
    """
    _hook()
    before, _state.watch = _state.watch, Watch()
    try:
        yield _state.watch
    finally:
        _state.watch = before


def _hook() -> None:
    global _hooked
    if not _hooked:
        _hooked = True
        sys.addaudithook(_audit)  # for the rest of the process; it does nothing outside the blocks


def check_expression(source: str | bytes | ast.AST) -> None:
    """Check one source.

    Raises:
        NotAnExpressionError: unless it is a harmless expression.
        SyntaxError: if it is no Python at all.
    """
    if source in (_SYMPYS_OWN, _SYMPYS_OWN.encode()):
        return
    # sympy evaluates some of what it has read as a syntax tree; anything else is text.
    tree = source if isinstance(source, ast.AST) else ast.parse(_without_indentation(source), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise NotAnExpressionError(f"it has a {type(node).__name__}")
        if isinstance(node, ast.Name) and (node.id in _REFUSED_NAMES or node.id.startswith("_")):
            raise NotAnExpressionError(f"{node.id!r:.100} is not mathematics")
        if isinstance(node, ast.Call) and not isinstance(node.func, ast.Name | ast.Call):
            raise NotAnExpressionError("it calls something that has no name")
        if isinstance(node, ast.BinOp):
            _check_size(node)
        if _is_call_of_pow(node):
            _check_power(*node.args[:2])


def _check_size(node: ast.BinOp) -> None:
    if isinstance(node.op, ast.LShift) and not (
        isinstance(node.right, ast.Constant) and _size(node.right.value) <= MAX_EXPONENT
    ):  # the task bitwise_arithmetic has its right answers computed from shifts by a few bits
        raise NotAnExpressionError(f"it shifts bits, and not by a number up to {MAX_EXPONENT}")
    if isinstance(node.op, ast.Mult) and (_is_sequence(node.left) or _is_sequence(node.right)):
        raise NotAnExpressionError("it repeats a list or a text")
    if isinstance(node.op, ast.Pow):
        _check_power(node.left, node.right)


def _check_power(base: ast.expr, exponent: ast.expr) -> None:
    parts = list(ast.walk(exponent))
    if any(isinstance(part, ast.LShift) for part in (*parts, *ast.walk(base))):
        raise NotAnExpressionError("a power of shifted bits is not computed")
    if _is_number(parts) and _exponents(parts):
        raise NotAnExpressionError("a tower of powers is not computed")
    largest = _largest(exponent)
    if _is_number(parts) and _is_number(below := list(ast.walk(base))):
        largest *= math.prod(max(_largest(inner), 1.0) for inner in _exponents(below))
    if largest > MAX_EXPONENT:
        raise NotAnExpressionError(f"its exponent is above {MAX_EXPONENT}")


def _is_number(parts: list[ast.AST]) -> bool:
    numbers = {*_MAKERS_OF_NUMBERS, *_MATHEMATICS}
    return not any(isinstance(part, ast.Name) and part.id not in numbers for part in parts)


def _exponents(parts: list[ast.AST]) -> list[ast.expr]:
    powers = [part.right for part in parts if isinstance(part, ast.BinOp) and isinstance(part.op, ast.Pow)]
    return powers + [part.args[1] for part in parts if _is_call_of_pow(part)]


def _is_call_of_pow(node: ast.AST) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "pow" and len(node.args) > 1
    )


def _largest(exponent: ast.expr) -> float:
    return max((_size(part.value) for part in ast.walk(exponent) if isinstance(part, ast.Constant)), default=0.0)


def _is_sequence(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return _is_sequence(node.left) or _is_sequence(node.right)
    return isinstance(node, ast.List | ast.Tuple) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _size(value: object) -> float:
    """A number's size; sympy hands over decimals as text."""
    if isinstance(value, str):
        try:
            return abs(float(value))
        except ValueError:
            return 0.0
    return abs(value) if isinstance(value, int | float) else 0.0


def _without_indentation(source: str | bytes) -> str | bytes:
    return source.lstrip(b" \t") if isinstance(source, bytes) else source.lstrip(" \t")  # as eval has it


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _state.watch is not None and event not in _COMPUTING:
        _state.watch.tripped = True
        raise NotAnExpressionError(f"nothing but computing is allowed here, and this is {event}")
    if event != "compile" or _state.block is None or _state.looking:
        return
    source, filename = arguments[:2]
    # A module that is imported late is compiled from its file; text is not, and cannot say that it were.
    if source is None or os.path.isabs(os.fsdecode(filename) if isinstance(filename, str | bytes) else ""):
        return
    _state.looking = True  # looking means compiling, too
    try:
        check_expression(source)
    except (NotAnExpressionError, SyntaxError, RecursionError, MemoryError, UnicodeDecodeError) as error:
        if not _is_librarys_own():
            raise NotAnExpressionError(f"an answer is an expression, and this is none: {error}") from error
    finally:
        _state.looking = False


def _is_librarys_own() -> bool:
    """Whether a library makes a function out of text of its own, in which nothing of an answer stands.

    A module that is being imported may well make its classes so; no expression imports any. And sympy writes the
    products of monomials, which integrals and fractions take, for the number of variables.
    """
    monomials = sys.modules.get("sympy.polys.monomials")
    writer = monomials.MonomialOps._build.__code__ if monomials is not None else None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not _state.block:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>" or frame.f_code is writer:
            return True
        frame = frame.f_back
    return False
