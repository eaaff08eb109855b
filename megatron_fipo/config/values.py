"""Checks each value by itself against its declaration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

from megatron_fipo.config.declaration import declaration_of, problems_of
from megatron_fipo.config.errors import Problem
from megatron_fipo.config.keys import field_types


def section_problems(section: Any, prefix: str) -> Iterator[Problem]:
    """Values that break what their keys were declared with, in a section and the sections in it.

    Data sources are checked by `cross_rules.sources`, shadow objectives by `cross_rules.shadows`.

    Args:
        prefix: prefix of the section's keys in messages, such as "train."; empty for a whole configuration.
    """
    types = field_types(type(section))
    for item in fields(section):
        value, name = getattr(section, item.name), prefix + item.name
        if is_dataclass(value):
            yield from section_problems(value, f"{name}.")
        else:
            yield from problems_of(name, value, types[item.name], declaration_of(item))


def choices_of(section: type, name: str) -> tuple[str, ...]:
    """The choices that a key was declared with."""
    return next(declaration_of(item).choices for item in fields(section) if item.name == name)
