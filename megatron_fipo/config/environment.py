"""Values that a configuration takes from environment variables: used as they are, written down as references.

`${oc.env:NAME}` is how secrets come into a run (a reward model's key in its URL, say). What is written (config.yaml,
checkpoints, trackers, logs, messages) holds the reference and never the value. Two things do it: `written_values` puts
references back where the configuration had them, and `without_secrets` replaces values wherever they turn up in a text.

The references are remembered for the process, to which the environment belongs, too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias
from urllib.parse import quote

from omegaconf import DictConfig, OmegaConf

from megatron_fipo.config.keys import declarations_along
from megatron_fipo.config.sections import Config

_SECRET_PARTS = frozenset(
    {
        *("AUTH", "BEARER", "COOKIE", "CRED", "CREDS", "CREDENTIAL", "CREDENTIALS", "DSN", "JWT", "KEY", "KEYS"),
        *("OAUTH", "PASS", "PASSPHRASE", "PASSWD", "PASSWORD", "PASSWORDS", "PAT", "PSW", "PW", "PWD", "SECRET"),
        *("SECRETS", "SIGNATURE", "TOKEN", "TOKENS"),
    }
)
"""Parts of a variable's name, between underscores or capitals, that make it a secret's."""
_SECRET_WORDS = re.compile(r"TOKEN(?!IZER|S\b|S_)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY")
"""Words that do so inside a longer part, too: MYTOKEN, DBPASSWORD."""
_NO_SECRETS = frozenset({"PWD", "OLDPWD", "SSH_AUTH_SOCK"})
"""Names that every shell sets, which look like a secret's."""
_COUNTED = frozenset({"MAX", "MIN", "NUM", "BATCHED", "COUNT", "LIMIT"})
"""Beside one of these parts, TOKENS are a model's tokens."""

Path: TypeAlias = tuple[str | int, ...]
"""A key's parts; an index for an item of a list."""

_VARIABLE = re.compile(r"oc\.env:\s*([A-Za-z_][A-Za-z0-9_]*)")
_KEY_REFERENCE = re.compile(r"\$\{\s*(\.*[A-Za-z_][\w.\[\]-]*)\s*\}")
_LEAST_CHARACTERS = 6
"""Shorter values are not looked for in texts: they would be found by chance."""

_references: dict[tuple[Path, Any], str] = {}
"""Text of the configuration with its references, by key (its parts) and resolved value."""
_masked: dict[str, str] = {}
"""Reference by value, of values that no text may show; spellings of a value, such as in a URL, are entries too."""


def looks_secret(variable: str) -> bool:
    """Whether an environment variable's name suggests a value that must not be written down."""
    name = variable.upper()
    if name in _NO_SECRETS:
        return False
    humps = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", variable).upper()
    parts = {part.strip("0123456789") for part in humps.split("_")}
    if parts & _COUNTED:
        parts.discard("TOKENS")
    return bool(_SECRET_WORDS.search(name) or parts & _SECRET_PARTS)


def variables_in(text: str) -> list[str]:
    """Names of the environment variables that a text refers to."""
    return _VARIABLE.findall(text)


def remember_references(unresolved: DictConfig, config: Config) -> None:
    """Note which values of a configuration came from environment variables.

    Args:
        unresolved: the merged configuration with its interpolations.
        config: the same, resolved.
    """
    tree = OmegaConf.to_container(unresolved, resolve=False)
    for path, text in _leaves(tree):
        if not isinstance(text, str) or "${" not in text:
            continue
        names = _variables(text, path, tree, frozenset())
        if not names:
            continue
        value = _at(asdict(config), path)
        if isinstance(value, (str, int, float)):
            _references[path, value] = text
        is_place = _is_place(path)
        for name in names:
            if looks_secret(name) or not is_place:
                _mask(os.environ.get(name, ""), f"${{oc.env:{name}}}")


def without_secrets(text: str) -> str:
    """A text with references in place of values from environment variables; values that are paths or names stay."""
    for value in sorted(_masked, key=len, reverse=True):  # a value may be part of another
        if value in text:
            text = text.replace(value, _masked[value])
    return text


def without_variables(text: str, unresolved: DictConfig) -> str:
    """A text with references in place of the values of all variables that a configuration names, short ones too.

    For messages about values that could not be resolved, of which nothing is remembered yet.
    """
    names = {name for _, leaf in reference_leaves(unresolved) for name in _VARIABLE.findall(leaf)}
    values = {os.environ.get(name, ""): name for name in sorted(names)}
    for value in sorted(filter(str.strip, values), key=len, reverse=True):
        reference = f"${{oc.env:{values[value]}}}"
        for spelling in dict.fromkeys((value, value.strip(), repr(value)[1:-1])):
            text = re.sub(rf"(?<!\w){re.escape(spelling)}(?!\w)", reference.replace("\\", r"\\"), text)
    return text


def reference_leaves(unresolved: DictConfig) -> Iterator[tuple[str, str]]:
    """Key, dotted, and text of every value that has an interpolation in it."""
    for path, leaf in _leaves(OmegaConf.to_container(unresolved, resolve=False)):
        if isinstance(leaf, str) and "${" in leaf:
            yield ".".join(map(str, path)), leaf


def written_values(config: Config, literal: Callable[[str], str] = str) -> dict[str, Any]:
    """`asdict` for writing down: references stand where the configuration had them.

    Args:
        literal: applied to every text that came from no variable.
    """

    def written(path: Path, value: Any) -> Any:
        if (reference := reference_of(path, value)) is not None:
            return reference
        return without_secrets(literal(value)) if isinstance(value, str) else value

    values: dict[str, Any] = _map_leaves(asdict(config), (), written)
    return values


def values_for_comparison(config: Config) -> dict[str, Any]:
    """`asdict` with references in place of secrets: replacing one secret by another changes nothing."""

    def compared(path: Path, value: Any) -> Any:
        reference = reference_of(path, value)
        return reference if reference is not None and _is_secret(path, reference) else value

    values: dict[str, Any] = _map_leaves(asdict(config), (), compared)
    return values


def reference_of(path: Path, value: Any) -> str | None:
    """The configuration's text at a key if it names an environment variable; None otherwise."""
    try:
        return _references.get((path, value))
    except TypeError:  # no such value can be a key
        return None


def recorded_values(config: Config) -> dict[str, Any]:
    """What a checkpoint keeps of its configuration, for `check_resume`: `written_values`, and digests under
    "environment"."""
    return {**written_values(config), "environment": environment_digests(config)}


def environment_digests(config: Config, salt: str | None = None) -> dict[str, Any]:
    """Salted digests of values that came from the environment and are no secrets, so that a change is noticed.

    A secret has none: a run with another secret is the same run, and a digest could be attacked by guessing.

    Returns:
        {"salt": …, "digests": {"model.path": …}}.
    """
    salt = salt or secrets.token_hex(16)
    digests = {}
    for path, value in _leaves(asdict(config)):
        text = reference_of(path, value)
        if text is not None and not _is_secret(path, text):
            digests[".".join(map(str, path))] = value_digest(value, salt)
    return {"salt": salt, "digests": digests}


def value_digest(value: Any, salt: str) -> str:
    """Digest of a value under a salt."""
    text = json.dumps(value, default=str).encode()
    return hashlib.blake2b(text, digest_size=16, key=bytes.fromhex(salt)).hexdigest()


def _is_secret(path: Path, text: str) -> bool:
    return not _is_place(path) or any(map(looks_secret, _VARIABLE.findall(text)))


def _is_place(path: Path) -> bool:
    """Whether a key's value is a place or a name: messages show it, since people need to copy it."""
    along = declarations_along([str(part) for part in path])
    return len(along) == len(path) and along[-1].text in ("path", "name")


def _mask(value: str, reference: str) -> None:
    if len(value.strip()) < _LEAST_CHARACTERS:
        return
    for spelling in (
        value,
        value.strip(),
        quote(value),
        quote(value, safe=""),
        json.dumps(value)[1:-1],
        repr(value)[1:-1],
    ):
        _masked[spelling] = reference


def _variables(text: str, path: Path, tree: Any, seen: frozenset[Path]) -> set[str]:
    """Names of the environment variables that a text with interpolations comes from, through other keys, too."""
    names = set(_VARIABLE.findall(text))
    for reference in _KEY_REFERENCE.findall(text):
        target = _target(reference, path)
        if target in seen:
            continue
        for below, leaf in _leaves(_at(tree, target), target):
            if isinstance(leaf, str) and "${" in leaf:
                names |= _variables(leaf, below, tree, seen | {target})
    return names


def _target(reference: str, path: Path) -> Path:
    """Path of `section.key`, or of `.key` and `..key` relative to where they stand."""
    name = reference.lstrip(".")
    num_dots = len(reference) - len(name)
    parts = tuple(int(part) if part.isdecimal() else part for part in re.split(r"[.\[\]]+", name) if part)
    return (path[: len(path) - num_dots] if num_dots else ()) + parts


def _leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index))
    else:
        yield path, value


def _map_leaves(value: Any, path: Path, change: Callable[[Path, Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_leaves(item, (*path, key), change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_leaves(item, (*path, index), change) for index, item in enumerate(value)]
    return change(path, value)


def _at(tree: Any, path: Path) -> Any:
    for part in path:
        if isinstance(tree, Mapping):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        else:
            return None
    return tree
