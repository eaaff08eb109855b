"""Every key is declared once: with bounds or choices that are asked, and words for the reference."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field
from pathlib import Path
from typing import Any, List, Optional

import pytest

from megatron_fipo.actor import precision
from megatron_fipo.config import Config, DataSourceConfig, ShadowConfig, sections
from megatron_fipo.config.declaration import Declaration, declaration_of, key
from megatron_fipo.config.keys import field_types
from megatron_fipo.config.values import section_problems
from megatron_fipo.data.row_forms import ROW_FORMS
from megatron_fipo.rl.advantages import ESTIMATORS
from megatron_fipo.rollout.servers.setup import ADAPTERS
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS


def declared_keys(section: type, prefix: str = "") -> Iterator[tuple[str, type, Field[Any]]]:
    """Every key below a section (dotted; a source's under its own name), the section that declares it and its field."""
    types = field_types(section)
    for item in dataclasses.fields(section):
        if dataclasses.is_dataclass(types[item.name]):
            yield from declared_keys(types[item.name], f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", section, item


EVERY_KEY = [
    *declared_keys(Config),
    *declared_keys(DataSourceConfig, "data.train.NAME."),
    *declared_keys(ShadowConfig, "objective.shadow.NAME."),
]


# --- bounds and choices ----------------------------------------------------------------------------------------------


def unbounded(keys: Sequence[tuple[str, type, Field[Any]]]) -> list[str]:
    """Numbers that were declared without a lower bound."""
    return [
        name
        for name, section, item in keys
        if re.search(r"\b(int|float)\b", str(field_types(section)[item.name])) and not declaration_of(item).is_bounded
    ]


def outside(declared: Declaration, is_float: bool) -> list[Any]:
    """The nearest values beyond each bound, and what is none of the choices."""
    values: list[Any] = ["no such choice"] if declared.choices else []
    if declared.least is not None and math.isfinite(declared.least):
        values.append(math.nextafter(declared.least, -math.inf) if is_float else declared.least - 1)
    if declared.most is not None:
        values.append(math.nextafter(declared.most, math.inf) if is_float else declared.most + 1)
    values += [bound for bound in (declared.above, declared.below) if bound is not None]
    if is_float and declared.is_bounded:
        values += [math.nan, -math.inf, *([math.inf] if declared.finite else [])]
    return values


def inside(declared: Declaration, is_float: bool) -> list[Any]:
    """The outermost values within the bounds, and every choice."""
    values: list[Any] = [*declared.choices]
    values += [bound for bound in (declared.least, declared.most) if bound is not None and math.isfinite(bound)]
    if is_float:
        values += [math.nextafter(declared.above, math.inf)] if declared.above is not None else []
        values += [math.nextafter(declared.below, -math.inf)] if declared.below is not None else []
        values += [math.inf] if not declared.finite else []
    return values


def slips(section: type, item: Field[Any]) -> list[tuple[str, Any]]:
    """Values of a key that are judged otherwise than it was declared, or without naming the key."""
    annotation, declared, found = field_types(section)[item.name], declaration_of(item), []
    is_float = "float" in str(annotation)
    for is_refused, values in ((True, outside(declared, is_float)), (False, inside(declared, is_float))):
        for value in values:
            given = [value] if typing.get_origin(annotation) is list else value
            problems = list(section_problems(dataclasses.replace(section(), **{item.name: given}), "here."))
            if any(problem.key == f"here.{item.name}" for problem in problems) is not is_refused:
                found.append((item.name, value))
    return found


def test_every_number_has_a_bound() -> None:
    """A number that nothing checks would fail somewhere inside Megatron instead."""
    assert len(EVERY_KEY) > 130
    assert unbounded(EVERY_KEY) == []


def test_every_key_is_judged_as_it_was_declared() -> None:
    tried = [(section, item) for _, section, item in EVERY_KEY if outside(declaration_of(item), is_float=True)]
    assert len(tried) > 90
    assert [slip for section, item in tried for slip in slips(section, item)] == []


@dataclasses.dataclass(frozen=True)
class Careless:
    """Keys as somebody in a hurry writes them."""

    forgotten: int = 3
    bare: Optional[float] = key(None)
    sound: int = key(3, least=1)
    chosen: str = key("a", choices=("a", "b"))


def test_a_number_without_a_bound_is_noticed() -> None:
    assert unbounded([*declared_keys(Careless)]) == ["forgotten", "bare"]


def test_a_bound_that_nobody_asks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    items = {item.name: item for item in dataclasses.fields(Careless)}
    assert slips(Careless, items["sound"]) == slips(Careless, items["chosen"]) == []
    monkeypatch.setattr(Declaration, "allows", lambda self, number: True)
    assert slips(Careless, items["sound"]) == [("sound", 0)]
    monkeypatch.setattr(Declaration, "allows", lambda self, number: False)
    assert slips(Careless, items["sound"]) == [("sound", 1)]
    monkeypatch.setattr("megatron_fipo.config.values.declaration_of", lambda item: Declaration())
    assert slips(Careless, items["chosen"]) == [("chosen", "no such choice")]


def test_every_default_is_allowed_but_those_that_must_be_given() -> None:
    problems = [*section_problems(Config(), ""), *section_problems(DataSourceConfig(), "source.")]
    assert [problem.key for problem in problems] == ["model.path", "source.kind", "source.verifier"]


@pytest.mark.parametrize(
    ("annotation", "declared", "words"),
    [
        (int, Declaration(least=1), "at least 1"),
        (float, Declaration(least=0), "at least 0 and finite"),
        (float, Declaration(least=-math.inf), "finite"),
        (float, Declaration(above=0, finite=False), "above 0"),
        (Optional[float], Declaration(above=1), "above 1 and finite"),
        (float, Declaration(above=0, below=1), "above 0 and below 1"),
        (float, Declaration(least=0, below=1), "at least 0 and below 1"),
        (int, Declaration(least=1024, most=65535), "between 1024 and 65535"),
        (int, Declaration(least=0, most=2**32 - 1), "between 0 and 4,294,967,295"),
        (List[float], Declaration(least=0), "at least 0 and finite"),
        (str, Declaration(choices=("a",)), ""),
    ],
)
def test_bounds_in_words(annotation: Any, declared: Declaration, words: str) -> None:
    assert declared.bounds(annotation) == words


# --- choices and what implements them --------------------------------------------------------------------------------

IMPLEMENTED = {
    "model.fp8": {"none", *precision._RECIPES},
    "rollout.engine": {"in_process", *ADAPTERS},
    "advantages.estimator": {*ESTIMATORS},
    "data.train.NAME.schema": {"columns", *ROW_FORMS},
    "data.train.NAME.verifier": {*BUILTIN_VERIFIERS},
}
"""Key -> what a table of the package has; each other choice is decided where it is read."""


def disagreeing(tables: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Key -> what is declared and not implemented, or implemented and not declared."""
    declared = {name: set(declaration_of(item).choices) for name, _, item in EVERY_KEY}
    return {name: declared[name] ^ known for name, known in tables.items() if declared[name] != known}


def test_every_choice_is_implemented() -> None:
    assert disagreeing(IMPLEMENTED) == {}


def test_a_choice_that_nothing_implements_is_noticed() -> None:
    without = IMPLEMENTED["advantages.estimator"] - {"group_std"} | {"critic"}
    assert disagreeing({"advantages.estimator": without}) == {"advantages.estimator": {"group_std", "critic"}}


# --- the reference ---------------------------------------------------------------------------------------------------


def undocumented_fields(source: str) -> list[str]:
    """Dataclass fields without a docstring under them; the reference of all keys is made of those docstrings."""
    missing = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef) or not any(
            "dataclass" in ast.unparse(item) for item in node.decorator_list
        ):
            continue
        if node.name.startswith("_"):
            continue
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            documented = (
                isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
                and isinstance(following.value.value, str)
            )
            sections = isinstance(statement, ast.AnnAssign) and ast.unparse(statement.annotation).endswith("Section")
            if isinstance(statement, ast.AnnAssign) and not documented and not sections and node.name != "Config":
                missing.append(f"{node.name}.{ast.unparse(statement.target)}")
    return missing


def test_every_key_has_a_docstring() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(sections.__file__).parent.glob("*.py")]
    assert len(sources) > 5
    assert [field for source in sources for field in undocumented_fields(source)] == []


def test_a_field_without_docstring_is_noticed() -> None:
    source = '@dataclass(frozen=True)\nclass A:\n    x: int = 1\n    """X."""\n    y: int = 2\n'
    assert undocumented_fields(source) == ["A.y"]
