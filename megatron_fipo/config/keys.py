"""The schema's keys, read off the dataclasses, and what is wrong with the keys and types of a file or an override."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config.declaration import Declaration, declaration_of
from megatron_fipo.config.foreign_keys import foreign_hint
from megatron_fipo.config.sections import Config, DataSourceConfig
from megatron_fipo.system.nearest_name import nearest_name

_ALMOST_THE_SAME = 0.9
"""Similarity from which a key counts as a misspelt key of its section, even if another trainer has it."""


_MEANT = {
    **dict.fromkeys(("model.name", "model.id", "model.name_or_path", "model.model_name"), "model.path"),
    **dict.fromkeys(("train.batch_size", "data.batch_size"), "rollout.num_prompts or train.num_minibatches"),
    **dict.fromkeys(("train.epochs", "train.num_train_epochs"), "train.num_steps or train.num_epochs"),
    **{
        f"parallel.{word}{ending}": f"parallel.{ours}"
        for word, ours in (("tensor", "tp"), ("pipeline", "pp"), ("context", "cp"))
        for ending in ("", "_parallel", "_parallel_size", "_size")
    },
}
"""Names that people guess and no other trainer has, for which the most similar key would be the wrong one."""


def field_types(section: Any) -> dict[str, Any]:
    """Annotation of every field of a dataclass, as the type itself and not as text."""
    return _field_types(section if isinstance(section, type) else type(section))


@cache
def _field_types(section: type) -> dict[str, Any]:
    return get_type_hints(section)


def entry_type(annotation: Any) -> type | None:
    """The dataclass of a dictionary's entries (DataSourceConfig for Dict[str, DataSourceConfig]), else None."""
    if get_origin(annotation) is not dict:
        return None
    entry: type = get_args(annotation)[1]
    return entry if is_dataclass(entry) else None


def annotation_at(parts: Sequence[str]) -> Any:
    """Type of the key with these parts: a section's dataclass, the type of an entry, or Any where there is none."""
    annotation: Any = Config
    for part in parts:
        if is_dataclass(annotation):
            annotation = field_types(annotation).get(part, Any)
        else:
            annotation = get_args(annotation)[1] if get_origin(annotation) is dict else Any
    return annotation


@cache
def _declared_fields(section: type) -> dict[str, tuple[Declaration, Any]]:
    """Declaration and type of each field of a section."""
    types = field_types(section)
    return {item.name: (declaration_of(item), types[item.name]) for item in fields(section)}


def declarations_along(parts: Sequence[str]) -> list[Declaration]:
    """Declarations of the key with these parts and of each section that it is in, as far as there are any.

    The name of a data source, or of a shadow objective, is declared by what holds them all; what is below a key (a
    source's params) is not.
    """
    annotation: Any = Config
    found: list[Declaration] = []
    for part in parts:
        if entry := entry_type(annotation):
            found.append(found[-1])
            annotation = entry
        elif is_dataclass(annotation) and part in (declared := _declared_fields(annotation)):  # type: ignore[arg-type]
            declaration, annotation = declared[part]
            found.append(declaration)
        else:
            break
    return found


@cache
def _known_keys() -> tuple[str, ...]:
    """Every key, dotted; <name> stands for the name of a data source or of a shadow objective."""

    def walk(section: type, prefix: str) -> Iterator[str]:
        for name, annotation in field_types(section).items():
            yield prefix + name
            if isinstance(annotation, type) and is_dataclass(annotation):
                yield from walk(annotation, f"{prefix}{name}.")
            elif entry := entry_type(annotation):
                yield from walk(entry, f"{prefix}{name}.<name>.")

    return tuple(walk(Config, ""))


def key_problems(layer: Any, section: type, prefix: str, place: str) -> Iterator[str]:
    """Unknown keys, and values where a section was expected, at any depth."""
    if not isinstance(layer, Mapping):
        known = list(field_types(section))
        meant = f" Did you mean {prefix}path={layer}?" if isinstance(layer, str) and "path" in known else ""
        yield (
            f"{prefix[:-1]}={shown(layer)} in {place}: a section was expected, with keys such as "
            f"{', '.join(known[:3])}. Indent its keys under it, or remove it.{meant}"
        )
        return
    types = field_types(section)
    for key, value in layer.items():
        if foreign := list(_foreign_problems(f"{prefix}{key}", value, types.get(key), place)):
            yield from foreign
        elif key not in types:
            yield _unknown_key_problem(str(key), prefix, tuple(types), place)
        elif types[key] is Any and isinstance(value, Mapping):  # the others of its type are texts and lists
            yield f"{prefix}{key}={dict(value)!r} in {place}: a text or a list of texts was expected."
        elif is_dataclass(types[key]):
            yield from key_problems(value, types[key], f"{prefix}{key}.", place)
        elif entry := entry_type(types[key]):
            if not isinstance(value, Mapping):
                entries = "sources" if entry is DataSourceConfig else "settings"
                yield (
                    f"{prefix}{key}={shown(value)} in {place}: {entries} by name were expected "
                    f"({prefix}{key}.<name>.{next(iter(field_types(entry)))})."
                )
                continue
            for name, source in value.items():
                yield from key_problems(source, entry, f"{prefix}{key}.{name}.", place)


def _foreign_problems(dotted: str, value: Any, annotation: Any, place: str) -> Iterator[str]:
    """What to write in place of each key of a whole section that only another trainer has; nothing if none of its keys
    is known."""
    if not isinstance(value, Mapping) or not (annotation is None or annotation in (str, int, float, bool)):
        return
    leaves = list(_leaves(value, f"{dotted}."))
    if any(foreign_hint(leaf) for leaf in leaves):
        for leaf in leaves:
            hint = foreign_hint(leaf) or "docs/migration.md has no counterpart of it."
            yield f"unknown key {leaf} in {place}. {hint}"


def _leaves(section: Mapping[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _unknown_key_problem(key: str, prefix: str, siblings: tuple[str, ...], place: str) -> str:
    is_ours = key in {known.rpartition(".")[2] for known in _known_keys()}  # in the wrong section
    almost = nearest_name(key, siblings, _ALMOST_THE_SAME)
    if meant := _MEANT.get(prefix + key):
        hint = f"Did you mean {meant}?"
    elif not is_ours and not almost and (foreign := foreign_hint(prefix + key)):
        hint = foreign
    elif nearest := nearest_name(key, siblings):
        hint = f"Did you mean {prefix}{nearest}?"
    else:  # perhaps the right name in the wrong section
        leaves = {known: known.rpartition(".")[2] for known in _known_keys()}
        nearest = nearest_name(key, leaves.values())
        elsewhere = [known for known, leaf in leaves.items() if leaf == nearest]
        hint = f"Did you mean {' or '.join(elsewhere)}?" if elsewhere else f"Known here: {', '.join(siblings)}."
    return f"unknown key {prefix}{key} in {place}. {hint}"


def look_up(layer: Any, dotted_key: str) -> Any:
    """The value at a dotted key of nested mappings; None where there is none."""
    for part in dotted_key.split("."):
        if not isinstance(layer, Mapping) or part not in layer:
            return None
        layer = layer[part]
    return layer


def type_problem(error: OmegaConfBaseException, layer: Mapping[str, Any], place: str) -> str:
    """Name key, value and expected type of what OmegaConf could not convert."""
    if not error.full_key:
        return f"{place}: {str(error).splitlines()[0]}."
    annotation = annotation_at(error.full_key.split("."))
    arguments = get_args(annotation) if get_origin(annotation) is Union else (annotation,)
    expected = " or ".join(map(expectation, arguments))
    value = look_up(layer, error.full_key)
    remedy = " Put it into quotes." if str in arguments else ""
    return f"{error.full_key}={shown(value)} in {place}: {expected} was expected.{remedy}"


def shown(value: Any) -> str:
    """A value as a message has it: not too long, and null by its name in YAML."""
    return "null" if value is None else f"{value!r:.200}"


def expectation(kind: Any) -> str:
    """What a key of a type takes, in words."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    if get_origin(kind) is list:
        item = get_args(kind)[0]
        return f"a list of {'whole numbers, such as [0,1],' if item is int else 'texts, such as [one,two],'}"
    return names.get(kind, "a section")
