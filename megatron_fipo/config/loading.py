"""From a YAML file and dotted overrides to a `Config`, and from a `Config` to the file beside the run."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config.errors import ConfigError, choice_problem
from megatron_fipo.config.input_paths import find_inputs, with_absolute_paths
from megatron_fipo.config.keys import key_problems, look_up, type_problem
from megatron_fipo.config.schema import ALGORITHMS, Config


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Precedence, lowest first: dataclass defaults, the algorithm's preset, the file, the overrides in their order.
    `${section.key}` stands for another value and `${oc.env:NAME}` for an environment variable. A
    relative path of what is to be read (model.path, a source's path) starts from the current folder, or, where that
    has no such file, from the configuration file's. Rules between values are `validate`'s business.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: `section.key=value`, the value in YAML's syntax: `train.num_steps=5`, `parallel.virtual_pp=null`.

    Raises:
        ConfigError: an unknown key, algorithm or malformed override, or a value of the wrong type, with its place.
    """
    layers = [] if path is None else [(str(path), _read_yaml_file(Path(path)))]
    layers += [(f"override {text!r}", _parse_override(text)) for text in overrides]
    for place, layer in layers:
        if problems := list(key_problems(layer, Config, prefix="", place=place)):
            raise ConfigError.of(problems, where=place)

    algorithm = Config.algorithm
    for _, layer in layers:
        algorithm = layer.get("algorithm", algorithm)
    if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
        raise ConfigError(choice_problem("algorithm", algorithm, tuple(ALGORITHMS)))

    merged = OmegaConf.structured(Config)
    for place, layer in [(f"preset of {algorithm}", ALGORITHMS[algorithm]), *layers]:
        try:
            merged = OmegaConf.merge(merged, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(type_problem(error, layer, place)) from error
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        value = OmegaConf.to_container(merged, resolve=False)
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{error.full_key}={look_up(value, error.full_key or '')}: {reason}.") from error
    assert isinstance(config, Config)
    return find_inputs(config, path)


class _YamlLoader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2 (`off` is a word, 1e-6 a number); a key given twice is an error."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - emptied of version 1.1's; filled below

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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


def _read_yaml_file(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"configuration file {path} cannot be read: {error.strerror}.") from error
    try:
        content = yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; sections such as 'train:' were expected.")
    return content


def _parse_override(text: str) -> dict[str, Any]:
    key, equals, value_text = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"override {text!r} is not of the form section.key=value, such as train.num_steps=5.")
    try:
        value: Any = yaml.load(value_text, Loader=_YamlLoader) if value_text.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {' '.join(str(error).split())}.") from error
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def resolved_yaml(config: Config) -> str:
    """Every key with its value; `load_config` reads it back to an equal Config, whatever the preset says by then."""
    return OmegaConf.to_yaml(OmegaConf.create(_escape_interpolations(asdict(config))))


def _escape_interpolations(value: Any) -> Any:
    """Resolved text that holds ${...} means it literally."""
    if isinstance(value, dict):
        return {key: _escape_interpolations(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escape_interpolations(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def save_resolved(config: Config, folder: str | Path) -> Path:
    """Write `resolved_yaml` to config.yaml in the run's folder, which is made if need be; its paths are absolute."""
    path = Path(folder) / "config.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(resolved_yaml(with_absolute_paths(config)), encoding="utf-8")
    return path
