"""Blocks of code in which text may be evaluated only if it is an expression of numbers, names and mathematics.

    with expressions_only():
        score = dataset.score_answer(answer, entry)

Libraries that read mathematics do it with `eval` (sympy's parse_expr, many scorers of reasoning-gym). A model's answer
is data, though: a list, a number, a formula. So an audit hook checks all source that `eval`, `exec` or `compile` gets
inside the block, whoever calls them. It refuses attributes, subscripts, statements, lambdas, and Python's built-in
names other than mathematical ones. Without this check a response could not leave its process (`forked_judge`), but
could have its own answer accepted there.
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
"""Largest exponent of a power; larger ones could take unlimited time."""

_NODES = (
    ast.Expression, ast.Constant, ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.Tuple, ast.List, ast.Set,
    ast.Dict, ast.Name, ast.Load, ast.Call, ast.keyword, ast.unaryop, ast.operator, ast.boolop, ast.cmpop,
)  # fmt: skip
_MATHEMATICS = frozenset(
    ("abs", "bool", "complex", "divmod", "float", "int", "len", "max", "min", "pow", "range", "round", "sum")
)
_COMPUTING = frozenset(("builtins.id", "object.__getattr__", "sys._getframe"))
"""Audit events that pure computation may raise. If one is missing here, the response is judged in a fork."""
_SYMPY_IMPORT = "from sympy import *"
"""The statement with which parse_expr fills its namespace; harmless, whoever writes it."""
_REFUSED_NAMES = frozenset(dir(builtins)) - _MATHEMATICS

_NUMBER_CONSTRUCTORS = frozenset(("Integer", "Float", "Rational"))
"""Names of the calls in which sympy's parser wraps a number."""


class NotAnExpressionError(ValueError):
    """Text that is no harmless expression was about to be evaluated."""


class Watch:
    """The record of a `no_code` block."""

    tripped = False
    """Whether anything in the block tried to run text, or to do more than compute."""


class _State(threading.local):
    block: FrameType | None = None
    """Frame of the function that contains the `expressions_only` block; None outside."""
    looking = False
    """Whether the hook itself is parsing source, which raises the same event."""
    watch: Watch | None = None
    """The record of the `no_code` block; None outside."""


_state = _State()
_hooked = False


@contextlib.contextmanager
def expressions_only() -> Iterator[None]:
    """Refuse, in this thread, to evaluate text that is no harmless expression.

    Raises:
        NotAnExpressionError: from the call that tried; a library may catch it inside the block.
    """
    _hook()
    before, _state.block = _state.block, sys._getframe(2)  # past this function and contextlib's
    try:
        yield
    finally:
        _state.block = before


@contextlib.contextmanager
def no_code() -> Iterator[Watch]:
    """Refuse, in this thread, all but computation: to run text, import, open files, start processes or use the network.

    Python announces these to audit hooks. The code that tried may swallow the exception, so the block's result counts
    only if the watch has not tripped.
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
    if source in (_SYMPY_IMPORT, _SYMPY_IMPORT.encode()):
        return
    # sympy evaluates some expressions as a syntax tree; everything else is text.
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
    ):  # the scorer of the task bitwise_arithmetic evaluates its problem, which shifts by a few bits
        raise NotAnExpressionError(f"it shifts bits by something else than a number up to {MAX_EXPONENT}")
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
    numbers = {*_NUMBER_CONSTRUCTORS, *_MATHEMATICS}
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
    """Absolute value of a number; sympy passes decimals as text. 0 for anything else."""
    if isinstance(value, str):
        try:
            return abs(float(value))
        except ValueError:
            return 0.0
    return abs(value) if isinstance(value, int | float) else 0.0


def _without_indentation(source: str | bytes) -> str | bytes:
    return source.lstrip(b" \t") if isinstance(source, bytes) else source.lstrip(" \t")  # as eval does


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _state.watch is not None and event not in _COMPUTING:
        _state.watch.tripped = True
        raise NotAnExpressionError(f"only computation is allowed here, and this is {event}")
    if event != "compile" or _state.block is None or _state.looking:
        return
    source, filename = arguments[:2]
    # A module that is imported inside the block is compiled from its file, with an absolute path; eval's text is not.
    if source is None or os.path.isabs(os.fsdecode(filename) if isinstance(filename, str | bytes) else ""):
        return
    _state.looking = True  # the check compiles, too
    try:
        check_expression(source)
    except (NotAnExpressionError, SyntaxError, RecursionError, MemoryError, UnicodeDecodeError) as error:
        if not _is_librarys_own():
            raise NotAnExpressionError(f"an answer must be an expression, and this is none: {error}") from error
    finally:
        _state.looking = False


def _is_librarys_own() -> bool:
    """Whether a library is compiling text of its own, which contains nothing of an answer.

    A module may do so while it is imported, to make its classes; no harmless expression imports a module. sympy
    generates the code of its products of monomials, which integrals and fractions use, for each number of variables.
    """
    monomials = sys.modules.get("sympy.polys.monomials")
    writer = monomials.MonomialOps._build.__code__ if monomials is not None else None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not _state.block:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>" or frame.f_code is writer:
            return True
        frame = frame.f_back
    return False
