"""The configuration of a run as its report shows it: dotted keys, and nothing that may be a secret.

config.yaml holds references in place of what came from environment variables. Secrets that somebody typed into a
configuration stand there as they are; a report is passed on, and shows none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_fipo.config.environment import looks_secret

LEFT_OUT = "(left out)"
"""Stands where a text may be a secret."""

_SECRET_END = re.compile(
    r"(?:key|token|password|passwd|passphrase|pwd|secret|credentials?|auth|authorization|cookie|signature)$",
    re.IGNORECASE,
)
"""How the name of a secret ends: api_key, hubToken."""
_NO_SECRET = re.compile(r"\$\{oc\.env:[^}]*\}|")
"""A reference to an environment variable is no secret; nor is nothing."""
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]{0,30}://)(\S*)")
_OPTION = re.compile(r"(?<![\w-])(?:-{1,2}[A-Za-z][\w.-]{0,60}(?:=| +(?!-))|[A-Za-z][\w.-]{0,60}=)")
_OPTION_VALUE = re.compile(r"\"[^\"]*\"|'[^']*'|\S+")
"""A name and its value within a text: --api-key VALUE, HF_TOKEN=VALUE."""
_HEADER = re.compile(
    r"(?<![\w-])((?:(?:[A-Za-z0-9]{1,30}[-_]){1,6}(?:key|token|secret)|(?:proxy-)?authorization|cookie|password): ?)"
    r"[^\n]+",
    re.IGNORECASE,
)
"""A header with a secret, X-API-Key: VALUE; of "Answer key: 5", in which there is none, the name has one part."""
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{30,}|eyJ[\w-]{10,1000}\.[\w-]{10,}\.[\w-]*)"
    r"|\b[Bb]earer\s+\S{8,}"
)
"""What the keys of well-known services look like."""


def flat_values(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every value of a configuration by its dotted key, as it is; an item of a list has its index as the last part."""
    return dict(_leaves(config, ()))


def written_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Flat values with `LEFT_OUT` in place of what may be a secret."""
    return {key: _written(key, value, values) for key, value in values.items()}


def without_credentials(text: str) -> str:
    """A text whose URLs have neither a user's name and password nor a query, and which holds no well-known keys."""
    return _SHAPES.sub(LEFT_OUT, _URL.sub(_bare_url, text))


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, (*path, str(key)))
    elif isinstance(value, Sequence) and not isinstance(value, str) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, str(index)))
    elif isinstance(value, (Mapping, Sequence)) and not isinstance(value, str):
        yield ".".join(path), "{}" if isinstance(value, Mapping) else "[]"
    else:
        yield ".".join(path), value


def _written(key: str, value: Any, values: Mapping[str, Any]) -> Any:
    if value is None or isinstance(value, bool) or (isinstance(value, str) and _NO_SECRET.fullmatch(value)):
        return value
    parent, _, name = key.rpartition(".")
    if name.isdigit():
        before = values.get(f"{parent}.{int(name) - 1}")  # an option, whose value is the next item
        name = parent.rpartition(".")[2]
        if isinstance(before, str) and before.startswith("-") and "=" not in before and _names_secret(before):
            return LEFT_OUT
    if _names_secret(name) and (isinstance(value, str) or _SECRET_END.search(name)):
        return LEFT_OUT
    if not isinstance(value, str):
        return value
    return without_credentials(_without_values(_HEADER.sub(rf"\1{LEFT_OUT}", value)))


def _without_values(text: str) -> str:
    """A text with options, but without the values of those whose names are those of secrets."""
    kept, position = [], 0
    for option in _OPTION.finditer(text):  # one may begin within the value of the one before: a=1,api_key=VALUE
        if option.start() < position or not _names_secret(option[0].rstrip(" =")):
            continue
        value = _OPTION_VALUE.match(text, option.end())
        if value is not None and not _NO_SECRET.fullmatch(value[0]):
            kept += [text[position : option.end()], LEFT_OUT]
            position = value.end()
    return "".join([*kept, text[position:]])


def _names_secret(name: str) -> bool:
    return bool(_SECRET_END.search(name)) or looks_secret(name.strip("-").replace("-", "_"))


def _bare_url(match: re.Match[str]) -> str:
    scheme, rest = match.groups()
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    bare = scheme + place.rpartition("@")[2]  # the last one: a password may hold any character
    return bare if bare == match[0] else f"{bare} {LEFT_OUT}"
