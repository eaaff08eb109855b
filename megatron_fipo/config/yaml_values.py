"""Reads YAML text into values; the kind of value that a key takes decides how its text is read.

A key that takes text gets the text as it is written: `name: 1.10` is 1.10 and not the number 1.1. All else follows
YAML 1.2 (`off` is a word, 1e-6 a number).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from megatron_fipo.config.errors import ConfigError
from megatron_fipo.config.keys import field_types
from megatron_fipo.config.text_rules import lone_surrogate

MAX_LEVELS = 50
"""Levels that a configuration may be nested."""
MAX_VALUES = 100_000
"""Values in one file or override, those behind aliases counted each time."""

QUOTING = "Put text that holds any of : # { } [ ] , & * ! | > % @ ` into quotes"
_NULLS = ("", "~", "null", "Null", "NULL")
_MISSING = "???"
_MERGE = "<<"
_COMMENT = re.compile(r"[ \t]+#")
_NOT_A_COMMENT = re.compile(r"[ \t]+(#(?![\s]|$)[^\n]*)")
"""After a text without quotes: what YAML takes for a comment, and a reader perhaps for part of the text."""


class _YamlLoader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2, and an end to nesting."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - emptied of version 1.1's; filled below
    _level = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        self._level += 1
        if self._level > MAX_LEVELS:
            raise yaml.composer.ComposerError(problem=f"it is nested deeper than {MAX_LEVELS} levels")
        node: Node | None = super().compose_node(parent, index)
        self._level -= 1
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
):
    _YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def read_yaml(text: str, annotation: Any, place: str, *, is_override: bool = False) -> Any:
    """The value of a YAML text.

    Args:
        text: a file's content, or what follows an override's equals sign.
        annotation: type of the key that it is for: a dataclass, Dict[...], List[...], str, …
        place: where the text stands, for messages, such as "run.yaml" or "override 'run.name=x'".
        is_override: a single line, in which nothing is a comment.

    Raises:
        ConfigError: if it is no YAML, refers to itself, or is larger or deeper than a configuration can be.
    """
    loader = None
    try:
        loader = _YamlLoader(text)
        node = loader.get_single_node()
        if is_override and "#" in text[node.end_mark.index if node is not None else 0 :]:
            raise ConfigError(_comment_in_override(place))
        return None if node is None else _Reader(loader, text, place, is_override).value(node, annotation)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{place} is not valid YAML: {reason}. {QUOTING}.") from error
    except (ValueError, OverflowError) as error:  # of a scalar's constructor, such as a number of 5,000 digits
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{place} cannot be read: {error}.") from error
    finally:
        if loader is not None:  # the text may hold what no YAML may
            loader.dispose()


def _comment_in_override(place: str) -> str:
    return f"{place}: what begins with # would be left out as a comment. Put it into quotes, or remove it."


def override_text(text: str, annotation: Any, place: str) -> str | None:
    """The value of an override for a key that takes text: the text as it is, quotes around the whole of it aside.

    Raises:
        ConfigError: for null where the key cannot be null.
    """
    if text[:1] in ("'", '"') and (quoted := _quoted(text)) is not None:
        return _checked_text(quoted, place)
    return None if _is_null(text, annotation, place) else _checked_text(text, place)


def _checked_text(text: str, place: str) -> str:
    """A text, unless OmegaConf would put the key's default in its place, or no file could hold it.

    Raises:
        ConfigError: for ???, OmegaConf's mark of a value that is still to be given, and for lone surrogates.
    """
    if text == _MISSING:
        raise ConfigError(f"{place}: {_MISSING} stands for a value that is still to be given. Give it.")
    if half := lone_surrogate(text):
        raise ConfigError(f"{place}: {half}. Write the whole character.")
    return text


def text_type(annotation: Any) -> Any:
    """The annotation if a key of that type takes text (text that may be null included), else None."""
    return (
        annotation if annotation is str or (get_origin(annotation) is Union and str in get_args(annotation)) else None
    )


def _quoted(text: str) -> str | None:
    """Content of a text that is one quoted YAML scalar from end to end; None for any other."""
    try:
        node = _YamlLoader(text).get_single_node()
    except yaml.YAMLError:
        return None
    if isinstance(node, ScalarNode) and node.style and node.end_mark.index == len(text):
        return str(node.value)
    return None


def _is_null(text: str, annotation: Any, place: str) -> bool:
    """Whether a text without quotes means null. An empty one is null in files only: `key=` gives the empty text."""
    if text not in _NULLS or text == "":
        return False
    if type(None) in get_args(annotation):
        return True
    raise ConfigError(f"{place}: null is no text. Write '{text}' in quotes if that word is meant, '' for no text.")


class _Reader:
    """Turns the nodes of one text into values."""

    def __init__(self, loader: _YamlLoader, text: str, place: str, is_override: bool) -> None:
        self._loader, self._text, self._place, self._is_override = loader, text, place, is_override
        self._open: set[int] = set()
        """Identities of the nodes that the current one lies in."""
        self._num_values = 0

    def value(self, node: Node, annotation: Any) -> Any:
        """A node's value, for a key of the given type."""
        self._num_values += 1
        if self._num_values > MAX_VALUES:
            raise ConfigError(
                f"{self._place} comes to more than {MAX_VALUES:,} values when its aliases (*name) are followed; no "
                "configuration needs that."
            )
        if id(node) in self._open:
            raise ConfigError(f"{self._where(node)}: an alias (*name) refers to what it lies in. Write the value out.")
        if isinstance(node, ScalarNode):
            return self._scalar(node, annotation)
        if node.tag not in ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"):
            raise ConfigError(f"{self._where(node)}: the tag {node.tag} has no meaning in a configuration. Remove it.")
        self._open.add(id(node))
        try:
            if isinstance(node, SequenceNode):
                item = get_args(annotation)[0] if get_origin(annotation) is list else Any
                return [self.value(child, item) for child in node.value]
            assert isinstance(node, MappingNode)
            return self._mapping(node, annotation)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: MappingNode, annotation: Any) -> dict[Hashable, Any]:
        types = field_types(annotation) if is_dataclass(annotation) else None
        entry = get_args(annotation)[1] if get_origin(annotation) is dict else Any
        values: dict[Hashable, Any] = {}
        merged: dict[Hashable, Any] | None = None
        for key_node, child in node.value:
            if not isinstance(key_node, ScalarNode):
                raise ConfigError(f"{self._where(key_node)}: a key is a word, and a list or a section was given.")
            key = key_node.value
            if key == _MERGE and key_node.style is None:
                if merged is not None:
                    raise ConfigError(f"{self._where(key_node)}: {key} is given twice. Write <<: [*one, *two].")
                merged = self._merged(child, annotation)
                continue
            if key in values:
                raise ConfigError(f"{self._where(key_node)}: {key} is given twice.")
            values[key] = self.value(child, entry if types is None else types.get(key, Any))
        return {**(merged or {}), **values}

    def _merged(self, node: Node, annotation: Any) -> dict[Hashable, Any]:
        """What `<<` merges: one section, or several, where the first that has a key counts."""
        sections = node.value if isinstance(node, SequenceNode) else [node]
        values: dict[Hashable, Any] = {}
        for section in sections:
            if not isinstance(section, MappingNode):
                raise ConfigError(f"{self._where(node)}: << takes a section, as in <<: *name, or a list of sections.")
            values = {**self.value(section, annotation), **values}
        return values

    def _scalar(self, node: ScalarNode, annotation: Any) -> Any:
        value = self._scalar_value(node, annotation)
        if isinstance(value, str):
            return _checked_text(value, self._where(node))
        if annotation is bool and type(value) is int and value not in (0, 1):  # OmegaConf takes any for true
            raise ConfigError(f"{self._where(node)}: {value} is neither true nor false.")
        return value

    def _scalar_value(self, node: ScalarNode, annotation: Any) -> Any:
        if self._is_override and _COMMENT.match(self._text, node.end_mark.index):
            raise ConfigError(_comment_in_override(self._place))
        is_plain = node.style is None and node.tag.startswith("tag:yaml.org,2002:")
        if text_type(annotation) is None or not is_plain or self._has_tag(node):
            return self._loader.construct_object(node, deep=True)
        if node.value in _NULLS:
            return None  # refused where the key cannot be null, with its name
        dropped = _NOT_A_COMMENT.match(self._text, node.end_mark.index)
        if dropped:
            raise ConfigError(
                f"{self._where(node)}: {dropped[1]!r} after {node.value!r} would be left out as a comment. Put the "
                "text into quotes if it is part of it; if it is a comment, put a space after the #."
            )
        return node.value

    def _has_tag(self, node: ScalarNode) -> bool:
        """Whether a tag is written out, as in `!!int 5`."""
        return self._text[node.start_mark.index : node.start_mark.index + 1] == "!"

    def _where(self, node: Node) -> str:
        return self._place if self._is_override else f"{self._place}, line {node.start_mark.line + 1}"
