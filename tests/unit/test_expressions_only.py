"""Text is evaluated only if it is a harmless expression, whoever evaluates it."""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
from pathlib import Path

import pytest
import sympy

from megatron_fipo.verifiers import mathematics
from megatron_fipo.verifiers.expressions_only import (
    NotAnExpressionError,
    check_expression,
    expressions_only,
    no_code,
)
from megatron_fipo.verifiers.reasoning_gym_tasks import open_task, prepare, verify

pytestmark = pytest.mark.slow

EVALUATING = {
    "binary_matrix", "bitwise_arithmetic", "countdown", "intermediate_integration", "n_queens", "number_sorting",
    "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion",
}  # fmt: skip
"""Tasks of the installed reasoning-gym whose scorers evaluate text: the answer, or text of their own."""


@pytest.mark.parametrize(
    "source",
    ["1 + 2*(3 - 4)", "[[1, 0], [0, 1]]", "  ('a', 'b')", "sqrt(2)*x**2 + C", "exp(x)**(x**2)", "max(1, 2)", "2**5000",
     "(0x88b3 << 0x1) * 3",
     "(2**3)**4", "pow(2, 10)", "(x**3000)**3000", "[1] + [2]",
     "Integer (2 )**Symbol ('x')", "{1: True}", "-x < 3"],
)  # fmt: skip
def test_expressions_pass(source: str) -> None:
    check_expression(source)
    check_expression(source.encode())


@pytest.mark.parametrize(
    "source",
    ["__import__('os')", "open('x')", "().__class__", "[].append", "x[0]", "[i for i in x]", "lambda: 1", "f'{x}'",
     "(y := 1)", "eval('1')", "getattr(x, 'y')", "exec", "print", "9**9**9", "2**Integer(9)**Integer(9)", "2**5001",
     "pow(7, 10**9)", "pow(7, 5001)", "((10**500)**500)**500", "pow(pow(2, 500), 500)", "[[1]*10**9]", "'a'*10**9",
     "([1]+[2])*3",
     "1 << 5001", "1 << (1 << 10)", "2**(1 << 10)", "(1 << 9)**9", "pow(2, 1 << 9)",
      "(lambda: 1)()", "'a'.join('b')", "await x", "*x", "_x", "x if y else z", "a.b()"],
)  # fmt: skip
def test_code_does_not(source: str) -> None:
    with pytest.raises((NotAnExpressionError, SyntaxError)):
        check_expression(source)


def test_whoever_reads_text_in_the_block_reads_expressions() -> None:
    hostile = "__import__('sys').modules.setdefault('was_here', 1)"
    readers = [eval, exec, lambda text: compile(text, "answer.py", "eval"), sympy.parse_expr, sympy.sympify, sympy.S]
    for reader in readers:
        with expressions_only(), pytest.raises((NotAnExpressionError, sympy.SympifyError)):
            reader(hostile)
    assert "was_here" not in sys.modules
    eval(hostile)  # and outside of it, as ever
    assert sys.modules.pop("was_here") == 1
    with expressions_only():
        assert sympy.parse_expr("2*x + x") == 3 * sympy.Symbol("x")
        assert eval("[1, 2]") == [1, 2]


def test_modules_may_be_imported_in_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "imported_in_the_block.py").write_text(
        "from collections import namedtuple\nPair = namedtuple('Pair', 'a b')\nexec('value = [i for i in range(2)]')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with expressions_only():
        module = importlib.import_module("imported_in_the_block")
    assert module.value == [0, 1]


def test_a_watch_notices_what_was_swallowed() -> None:
    with no_code() as watch:
        assert sorted([2, 1]) == [1, 2]
    assert not watch.tripped
    for attempt in (lambda: eval("1"), lambda: os.listdir("/"), lambda: __import__("wave")):
        sys.modules.pop("wave", None)
        with no_code() as watch, contextlib.suppress(NotAnExpressionError):
            attempt()
        assert watch.tripped


def test_which_tasks_of_reasoning_gym_evaluate() -> None:
    """Only these need a fork for each response; for further ones in a new version, the worker forks by itself."""
    from reasoning_gym.factory import DATASETS

    tripped = set()
    for task in DATASETS.keys() - {"composite"}:
        entry = open_task(task, {}, seed=3, size=1)[0]
        reference = {"task": task, "params": {}, "entry": entry}
        prepare(reference)
        for answer in (entry["answer"], "no idea", "[1, 2]"):
            with no_code() as watch, contextlib.suppress(Exception):  # a broken scorer is another test's
                verify(f"<answer>{answer}</answer>", reference, "stop")
            if watch.tripped:
                tripped.add(task)
    assert tripped == EVALUATING


# ------------------------------------------------------------------------------------------------------- mathematics


def readers_of_text(package: str) -> set[tuple[str, str]]:
    """(file, function) of every call in a package that runs text as code or passes it to sympy's parser."""
    folder = Path(importlib.import_module(package).__file__ or "").parent
    names = {"eval", "exec", "compile", "__import__", "parse_expr", "sympify", "S", "lambdify", "import_module"}
    found = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
                found.add((path.name, node.func.id))
    return found


def test_mathematics_has_no_reader_of_text_but_sympys() -> None:
    """Neither package evaluates text itself; sympy's parser gets only what `expressions_only` admits."""
    assert readers_of_text("math_verify") == {("parser.py", "parse_expr")}
    # Values that the caller gives to variables (none here), and sympy objects, which are not text.
    known = {("latex2sympy2.py", "parse_expr"), ("logic.py", "sympify"), ("sets.py", "sympify")}
    assert {call for call in readers_of_text("latex2sympy2_extended") if call[1] != "import_module"} <= known


@pytest.mark.parametrize("wrapper", ["Answer: {}", r"\boxed{{{}}}", "Answer: ${}$", r"Answer: \text{{{}}}", "#### {}"])
def test_mathematics_runs_no_answer(wrapper: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for code in (f"open('{marker}', 'w')", f"__import__('os').mkdir('{marker}')", f"1+[].__class__('{marker}')"):
        for block in (expressions_only, no_code):
            with block():
                assert not mathematics.verify(wrapper.format(code), "7", "stop").correct
    assert not marker.exists()


def test_sympy_may_write_the_products_of_its_monomials() -> None:
    """Integrals and fractions need them; sympy compiles their code from text, once for each number of variables."""
    import sympy
    from sympy.polys.monomials import MonomialOps

    with expressions_only():
        assert MonomialOps(5).mul()((1, 0, 0, 0, 0), (1, 2, 0, 0, 0)) == (2, 2, 0, 0, 0)
        assert sympy.Integral(sympy.Symbol("x"), (sympy.Symbol("x"), 0, 1)).doit() == sympy.Rational(1, 2)
        with pytest.raises(NotAnExpressionError):
            exec("def f(): pass")


def test_what_is_no_number_is_no_distance_from_the_right_one() -> None:
    entry = open_task("complex_arithmetic", {}, seed=3, size=1)[0]
    reference = {"task": "complex_arithmetic", "params": {}, "entry": entry}
    assert verify(f"Answer: {entry['answer']}", reference, "stop").correct
    for answer in ("nan", "NaN", "nan+nani", "inf"):
        assert not verify(f"Answer: {answer}", reference, "stop").correct, answer


def test_a_scorer_that_raises_over_a_wrong_form_where_no_answer_is_known() -> None:
    entry = open_task("boxnet", {}, seed=3, size=1)[0]
    assert entry["answer"] is None
    assert verify('Answer: {"a": 1}', {"task": "boxnet", "params": {}, "entry": entry}, "stop").score == 0.0
