"""Finds the names of the program that tests mean as classes, rather than as functions that happen to be classes there.

An object of a class under test may be asked how it compares with values of the tests (`Money(3) == 3`). What stands in
the place of a function may not: a program could answer a test of `add(1, 2) == 3` with a class `add` whose == is always
true. The tests' own text tells the two apart, and the program has no say in it: a class is subclassed, named in
isinstance() or `except`, or its objects have attributes that no value of Python's has, or meet each other.
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
    """Names that tests, or the beginning of the program, use as those of classes.

    Args:
        tests: source.
        prompt: source of the program's beginning, empty if it has none or is no module.
        entry_point: the function that the problem asks for: never a class, unless the prompt says so.
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
    """Names N of whose objects (N(…), or v after v = N(…)) the tests take an attribute that no value has, or, where the
    name is written as a class's, do arithmetic with two, or change one by it.
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
    """What a statement gives a name to, and the value."""
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
    """The last part of a name with dots, such as that of a class in a module; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
