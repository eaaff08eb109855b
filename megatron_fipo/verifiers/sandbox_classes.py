"""Finds the names of the program that tests use as classes, not as functions which the program may define as classes.

An object of a class under test may be asked how it compares with values of the tests (`Money(3) == 3`). An object in
the place of a function's result may not: a program could pass a test of `add(1, 2) == 3` with a class `add` whose == is
always true. The program is not trusted to tell the two apart, so the text of the tests and of the prompt does: tests
subclass a class, name it in isinstance() or `except`, use attributes of its objects that no built-in value has, or
combine two of its objects.
"""

from __future__ import annotations

import ast
import itertools

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_ATTRIBUTES_OF_VALUES = frozenset(
    name
    for kind in (int, float, complex, str, bytes, list, tuple, dict, set, frozenset, type(None), type(lambda: None))
    for name in dir(kind)
)
_CHECKS_OF_CLASSES = ("isinstance", "issubclass")


def names_meant_as_classes(tests: str, prompt: str, entry_point: str) -> frozenset[str]:
    """The names that the tests use as classes, or that the prompt defines as classes.

    Args:
        tests: source of the tests.
        prompt: source of the program's beginning; empty if there is none or it does not parse.
        entry_point: the function that the problem asks for; it is a class only if the prompt defines it as one.
    """
    tree = ast.parse(tests)
    defined = ast.parse(prompt).body
    meant = {*_named_as_classes(tree), *_with_attributes(tree)} - {entry_point}
    meant -= {node.name for node in defined if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    return frozenset(meant | {node.name for node in defined if isinstance(node, ast.ClassDef)})


def _named_as_classes(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        classes: list[ast.expr] = []
        if isinstance(node, ast.ClassDef):
            classes = node.bases
        elif isinstance(node, ast.ExceptHandler) and node.type is not None:
            classes = [node.type]
        elif isinstance(node, ast.Call) and _name(node.func) in _CHECKS_OF_CLASSES:
            classes = node.args[1:]
        for part in classes:
            for element in part.elts if isinstance(part, ast.Tuple) else [part]:
                yield _name(element)


def _with_attributes(tree: ast.Module) -> Iterator[str]:
    """Names N whose objects, N(…) or v after v = N(…), the tests use as objects of a class.

    The tests take an attribute that no built-in value has; or, if N is capitalized, combine or compare two of the
    objects, or change one with an operator such as +=.
    """
    made_by: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        for target, value in _assignments(node):
            if isinstance(value, ast.Call):
                made_by.setdefault(_name(target), set()).add(_name(value.func))

    def makers(node: ast.expr) -> set[str]:
        return {_name(node.func)} if isinstance(node, ast.Call) else made_by.get(_name(node), set())

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr not in _ATTRIBUTES_OF_VALUES:
            yield _name(node.value)
            yield from makers(node.value)
        elif isinstance(node, ast.BinOp):
            yield from (name for name in makers(node.left) & makers(node.right) if name[:1].isupper())
        elif isinstance(node, ast.AugAssign):
            yield from (name for name in makers(node.target) if name[:1].isupper())
        elif isinstance(node, ast.Compare):
            for left, right in itertools.pairwise([node.left, *node.comparators]):
                yield from (name for name in makers(left) & makers(right) if name[:1].isupper())


def _assignments(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """The targets of an assignment, each with its value."""
    if isinstance(node, ast.Assign):
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                yield from zip(target.elts, node.value.elts, strict=False)
            else:
                yield target, node.value
    elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
        yield node.target, node.value
    elif isinstance(node, ast.withitem) and node.optional_vars is not None:
        yield node.optional_vars, node.context_expr


def _name(node: ast.expr) -> str:
    """A name, or the last part of a dotted one such as module.Class; empty for any other expression."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
