"""Reads references for programs, in the forms that data sets publish, into one of three styles.

A reference is a mapping or a list, or its JSON text. Keys whose value is null or "" count as absent.

- Tests: `tests` (a text, or a list of statements), with optional `prompt`, `entry_point` and `same_process`, as in
  HumanEval and MBPP.
- Input and output: `inputs` and as many `outputs`, each of them a text or a list of lines, with an optional `tolerance`
  for floating-point answers, as in APPS, TACO, PRIME and CodeContests.
- Calls: the same with `fn_name`. Each input is a list of arguments, or their JSON texts, one per line; each output is
  the result, as JSON or its text. If all outputs are lists of one value and not all inputs are texts, as in APPS and
  TACO, that value is accepted as the result, too.

The last two styles may also be given as a list of cases {"input": …, "output": …, "testtype": "stdin" or "functional"},
alone or under `cases`, `public_test_cases` or `private_test_cases`, as in LiveCodeBench. Any form may be nested under
`input_output`, as in APPS.
"""

from __future__ import annotations

import ast
import builtins
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_fipo.system.nearest_name import did_you_mean

_KEYS = {
    "tests", "prompt", "entry_point", "same_process", "inputs", "outputs", "fn_name", "tolerance", "cases",
    "input_output", "public_test_cases", "private_test_cases", "metadata",
}  # fmt: skip
_CASE_KEYS = {"input", "output", "testtype"}
_FORMS = (
    "a code reference has tests (statements, with prompt and entry_point where wanted), or inputs and as many outputs "
    "(with fn_name where a function is called), or cases with input and output each; docs/programs.md has examples"
)


@dataclass(frozen=True)
class CodeReference:
    """A parsed reference. Exactly one of `tests`, `outputs` and `results` is not empty.

    Attributes:
        prompt: beginning of a module, which the program completes or follows.
        entry_point: name of the function or method that the prompt asks for.
        tests: source of the tests.
        same_process: whether the tests run in the program's process.
        inputs: texts of the standard input, one per run.
        outputs: the expected standard output of each run.
        function: name of the function to call.
        calls: the arguments of each call.
        results: the results that are accepted for each call.
        tolerance: tolerance for floating-point answers, as `code_output` defines it.
    """

    prompt: str = ""
    entry_point: str = ""
    tests: str = ""
    same_process: bool = False
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    function: str = ""
    calls: tuple[tuple[Any, ...], ...] = ()
    results: tuple[tuple[Any, ...], ...] = ()
    tolerance: float = 0.0

    def asked_names(self) -> frozenset[str]:
        """The function that the program is to define, or else the names that the tests use and do not define."""
        if self.function or self.entry_point:
            return frozenset([self.function or self.entry_point])
        if not self.tests:
            return frozenset()
        tree = _parsed_tests(self.tests)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)} | set(dir(builtins))
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                bound.add(node.name)
            elif isinstance(node, ast.alias):
                bound.add((node.asname or node.name).partition(".")[0])
            elif isinstance(node, ast.arg):
                bound.add(node.arg)
        return frozenset(node.id for node in names) - bound


def read_reference(reference: Any) -> CodeReference:
    """Read a reference of any form.

    Raises:
        ValueError: if it is incomplete, contradictory or of another form; the message names the key and the remedy.
    """
    fields = _fields(reference)
    unknown = sorted(set(fields) - _KEYS)
    if unknown:
        hint = did_you_mean(str(unknown[0]), _KEYS) or " Leave it out of the reference."
        raise ValueError(f"a code reference has no key {unknown[0]!r}.{hint} Known: {', '.join(sorted(_KEYS))}.")
    fields = _with_cases(fields)
    styles = [key for key in ("tests", "inputs") if key in fields]
    if len(styles) != 1:
        raise ValueError(f"{_FORMS}; got {reference!r:.200}")
    style_keys = {
        "tests": {"tests", "prompt", "entry_point", "same_process"},
        "inputs": {"inputs", "outputs", "fn_name", "tolerance"},
    }[styles[0]]
    strange = sorted(set(fields) - style_keys)
    if strange:
        raise ValueError(f"a code reference with {styles[0]} has no use for {strange[0]!r}: leave it out; {_FORMS}")
    return _with_tests(fields) if styles[0] == "tests" else _with_inputs(fields)


def check_reference(reference: Any) -> None:
    """Refuse, before anything is generated, a reference that no program can pass.

    Raises:
        ValueError: as `read_reference`, and for tests that are no Python or, with an entry_point, define no `check`.
    """
    read = read_reference(reference)
    if not read.tests:
        return
    tree = _parsed_tests(read.tests)
    if read.entry_point and not any(
        (isinstance(node, ast.FunctionDef) and node.name == "check")
        or (isinstance(node, ast.Name) and node.id == "check" and isinstance(node.ctx, ast.Store))
        for node in ast.walk(tree)
    ):
        raise ValueError(
            "a code reference with an entry_point has tests that define check(candidate); these do not: "
            f"{read.tests!r:.200}. Leave entry_point out where the tests call the function by its name."
        )


def _parsed_tests(tests: str) -> ast.Module:
    try:
        return ast.parse(tests)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"the tests of a code reference are no Python: {error}. Correct the data's tests.") from error


def _fields(reference: Any) -> dict[str, Any]:
    if isinstance(reference, str):
        reference = _json(reference, "a code reference given as text")
    if isinstance(reference, Sequence) and not isinstance(reference, str | bytes):
        reference = {"cases": reference}
    if not isinstance(reference, Mapping):
        raise ValueError(f"{_FORMS}; got {reference!r:.200}")
    fields = {str(key): value for key, value in reference.items() if value is not None and value != ""}
    nested = fields.pop("input_output", None)
    if nested is not None:
        return {**fields, **_fields(nested)}
    return fields


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{what} is JSON, got {text!r:.100}: {reason}") from error


def _with_cases(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields, with lists of cases split into inputs and outputs."""
    given = [key for key in ("cases", "public_test_cases", "private_test_cases") if key in fields]
    metadata = fields.pop("metadata", None)
    if metadata is not None:
        metadata = _json(metadata, "metadata of a code reference") if isinstance(metadata, str) else metadata
        name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
        if name is not None:
            fields.setdefault("fn_name", name)
    if not given:
        return fields
    if "inputs" in fields or "outputs" in fields:
        raise ValueError(f"a code reference has {given[0]} or inputs and outputs, not both: leave one out")
    cases: list[Any] = []
    for key in given:
        value = fields.pop(key)
        if isinstance(value, str):
            if key == "private_test_cases" and not value.lstrip().startswith("["):
                raise ValueError(
                    "private_test_cases of a code reference are LiveCodeBench's compressed pickle, which is not read, "
                    "since unpickling runs what it holds: convert them to a JSON list of cases first"
                )
            value = _json(value, f"{key} of a code reference given as text")
        if not isinstance(value, Sequence) or not all(isinstance(case, Mapping) for case in value):
            raise ValueError(f"{key} of a code reference is a list of cases with input and output; got {value!r:.200}")
        cases += value
    return {**fields, **_inputs_of(cases, "fn_name" in fields)}


def _inputs_of(cases: list[Any], has_function: bool) -> dict[str, Any]:
    kinds = set()
    for number, case in enumerate(cases, 1):
        unknown = sorted(map(str, set(case) - _CASE_KEYS))
        if unknown or not {"input", "output"} <= set(case):
            raise ValueError(
                f"case {number} of a code reference has input, output and, where wanted, testtype; got {case!r:.200}"
            )
        kinds.add(case.get("testtype") or ("functional" if has_function else "stdin"))
    if len(kinds) > 1 or kinds - {"stdin", "functional"}:
        raise ValueError(
            f"the testtype of a code reference's cases is stdin or functional, for all the same; got {sorted(kinds)}"
        )
    if kinds == {"functional"} and not has_function:
        raise ValueError(
            "functional cases of a code reference need the function's name: put them under cases, and the name under "
            "fn_name (LiveCodeBench has it in metadata, as func_name)"
        )
    if kinds == {"stdin"} and has_function:
        raise ValueError("a code reference has fn_name and stdin cases; leave fn_name out, or make them functional")
    return {"inputs": [case["input"] for case in cases], "outputs": [case["output"] for case in cases]}


def _with_tests(fields: dict[str, Any]) -> CodeReference:
    tests = fields["tests"]
    lines = [tests] if isinstance(tests, str) else tests
    if not isinstance(lines, Sequence) or not all(isinstance(line, str) for line in lines):
        raise ValueError(f"tests of a code reference are a text or a list of texts; got {tests!r:.200}")
    for key in ("prompt", "entry_point"):
        if not isinstance(fields.get(key, ""), str):
            raise ValueError(f"{key} of a code reference is a text; got {fields[key]!r:.100}")
    source, entry_point = "\n".join(lines), fields.get("entry_point", "")
    if not source.strip():
        raise ValueError(f"a code reference's tests are empty; {_FORMS}")
    if entry_point:
        holder, _, method = entry_point.rpartition("().")
        if not all(name.isidentifier() for name in ([holder, method] if holder else [method])):
            raise ValueError(
                "entry_point of a code reference is the name of a function, or a method as in Solution().add; got "
                f"{entry_point!r:.100}"
            )
        source += f"\ncheck({entry_point})\n"
        entry_point = method
    same_process = fields.get("same_process", False)
    if not isinstance(same_process, bool):
        raise ValueError(f"same_process of a code reference is true or false; got {same_process!r:.100}")
    return CodeReference(fields.get("prompt", ""), entry_point, source, same_process)


def _with_inputs(fields: dict[str, Any]) -> CodeReference:
    inputs, outputs = fields["inputs"], fields.get("outputs")
    for key, value in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
            raise ValueError(f"{key} of a code reference are a list, not empty; got {value!r:.200}")
    assert outputs is not None
    if len(inputs) != len(outputs):
        raise ValueError(f"a code reference has as many outputs as inputs; got {len(inputs)} and {len(outputs)}")
    tolerance = fields.get("tolerance", 0.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, int | float) or not 0.0 <= tolerance < math.inf:
        raise ValueError(f"tolerance of a code reference is a number from 0 up; got {tolerance!r:.100}")
    name = fields.get("fn_name")
    if name is None:
        return CodeReference(
            inputs=tuple(_text(value, f"input {number}", "\n") for number, value in enumerate(inputs, 1)),
            outputs=tuple(_text(value, f"output {number}", "") for number, value in enumerate(outputs, 1)),
            tolerance=float(tolerance),
        )
    function = name.removeprefix("Solution.") if isinstance(name, str) else ""
    if not function.isidentifier():
        raise ValueError(f"fn_name of a code reference is the name of a function; got {name!r:.100}")
    calls = tuple(_arguments(value, number) for number, value in enumerate(inputs, 1))
    texts = all(isinstance(value, str) for value in inputs)
    expected = [
        _json(value, f"output {number} of a code reference with fn_name and inputs of JSON")
        if texts and isinstance(value, str)
        else value
        for number, value in enumerate(outputs, 1)
    ]
    wrapped = not texts and all(isinstance(value, list | tuple) and len(value) == 1 for value in expected)
    results = tuple((_plain(value), _plain(value[0])) if wrapped else (_plain(value),) for value in expected)
    return CodeReference(function=function, calls=calls, results=results, tolerance=float(tolerance))


def _text(value: Any, what: str, end: str) -> str:
    """The text of a program's input or output, from a text, a number or a list of lines."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, Sequence) and all(isinstance(line, str) for line in value):
        return "\n".join(line.removesuffix("\n") for line in value) + (end if value else "")
    raise ValueError(
        f"{what} of a code reference is a text or a list of lines; got {value!r:.100}. Where a function is to be "
        "called with it, name the function in fn_name."
    )


def _arguments(value: Any, number: int) -> tuple[Any, ...]:
    """The arguments of one call, from a list, or from a text with one JSON value per line."""
    if isinstance(value, str):
        whole = f"input {number} of a code reference with fn_name, one argument a line,"
        return tuple(_json(line, whole) for line in value.split("\n") if line.strip())
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return tuple(_plain(argument) for argument in value)
    raise ValueError(
        f"input {number} of a code reference with fn_name is the list of the call's arguments, or their JSON texts, "
        f"one a line; got {value!r:.100}. A single argument is a list of one: [{value!r:.50}]."
    )


def _plain(value: Any) -> Any:
    """Convert a value as a round trip through JSON would: tuples become lists, and keys texts.

    Raises:
        ValueError: for a value that JSON has no type for, such as an integer of numpy's.
    """
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise ValueError(f"a code reference with fn_name holds values of JSON's types; got a {type(value).__name__}")
