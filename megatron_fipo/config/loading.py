"""Reads a `Config` from a YAML file and dotted overrides, and writes one to the file beside the run."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_origin

from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config.environment import reference_leaves, remember_references, without_variables, written_values
from megatron_fipo.config.errors import ConfigError, choice_problem
from megatron_fipo.config.input_paths import find_inputs, with_absolute_paths
from megatron_fipo.config.keys import annotation_at, expectation, key_problems, look_up, type_problem
from megatron_fipo.config.presets import ALGORITHMS, correction_by_default
from megatron_fipo.config.sections import Config
from megatron_fipo.config.text_files import read_text
from megatron_fipo.config.yaml_values import override_text, read_yaml, text_type
from megatron_fipo.system.disk import write_text_whole


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a run's configuration.

    Precedence, lowest first: dataclass defaults, the algorithm's preset, the file, the overrides in their order. Where
    the file and the overrides leave objective.rollout_correction open, `correction_by_default` sets it.
    `${section.key}` stands for another value and `${oc.env:NAME}` for an environment variable. A relative path of an
    input (model.path, a source's path) starts from the current folder, or, where that has no such file, from the
    configuration file's. `validate` checks the values.

    A key that takes text gets it as it is written, in the file and in overrides: 1.10, 1e3, true and 007 are texts
    there. In an override it is all that follows the equals sign ("####" and brackets included), unless quotes
    stand around the whole of it. Null means null where the key may be null, and is refused where it may not; in quotes
    it is the word. In a file, YAML ends a text without quotes at " #"; anything but a comment there ("# " with a space)
    is refused.

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
        raise ConfigError.of([choice_problem("algorithm", algorithm, tuple(ALGORITHMS))])

    merged = copy.deepcopy(_defaults())
    for place, layer in [(f"preset of {algorithm}", ALGORITHMS[algorithm]), *layers]:
        try:
            for key in _emptied(layer, ()):
                parent, _, name = key.rpartition(".")
                if (section := OmegaConf.select(merged, parent)) is not None:
                    with read_write(section):
                        section[name] = {}
            OmegaConf.unsafe_merge(merged, layer)  # changes merged itself
        except OmegaConfBaseException as error:
            raise ConfigError(type_problem(error, layer, place)) from error
    config = _resolved(merged)
    if all(look_up(layer, "objective.rollout_correction") is None for _, layer in layers):
        by_default = correction_by_default(config.rollout.max_staleness_steps, config.objective.old_log_probs)
        if by_default != config.objective.rollout_correction:
            OmegaConf.unsafe_merge(merged, {"objective": {"rollout_correction": by_default}})
            config = _resolved(merged)  # again, for keys that refer to it
    config = find_inputs(config, path)
    remember_references(merged, config)
    return config


def _resolved(merged: DictConfig) -> Config:
    """Every key with its value, references replaced by what they refer to.

    Raises:
        ConfigError: what cannot be resolved, with its place.
    """
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(without_variables(_resolving_problem(error, merged), merged)) from None
    assert isinstance(config, Config)
    return config


@cache
def _defaults() -> DictConfig:
    """Every key with its default; to be copied, because making it anew takes five times as long."""
    defaults = OmegaConf.structured(Config)
    assert isinstance(defaults, DictConfig)
    return defaults


def _emptied(layer: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Dotted keys of sources and parameters that are {}: they mean empty, but merging {} would keep the entries."""
    for name, value in layer.items():
        parts = (*path, str(name))
        kind = annotation_at(parts)
        if isinstance(value, Mapping) and not value and get_origin(kind) is dict:
            yield ".".join(parts)
        elif isinstance(value, Mapping):
            yield from _emptied(value, parts)


def _resolving_problem(error: OmegaConfBaseException, merged: DictConfig) -> str:
    """Key, value and reason of what could not be resolved; the reason may hold an environment variable's value."""
    if error.full_key:
        value = look_up(OmegaConf.to_container(merged, resolve=False), error.full_key)
        return f"{error.full_key}={value}: {_interpolation_problem(error)}"
    for key, value in reference_leaves(merged):  # OmegaConf names no key where a list or a section was expected
        annotation = annotation_at(key.split("."))
        if get_origin(annotation) in (list, dict) or is_dataclass(annotation):
            return (
                f"{key}={value}: {expectation(annotation)} was expected, and ${{…}} gives one text or number. Write "
                "the brackets, with ${…} for what is in them."
            )
    return _interpolation_problem(error)


def _interpolation_problem(error: OmegaConfBaseException) -> str:
    reason = str(error).splitlines()[0]
    if found := re.search(r"Environment variable '([^']*)' not found", reason):
        return (
            f"the environment variable {found[1]} is not set. Set it (export {found[1]}=…) where the run starts, or "
            f"give a value to take instead: ${{oc.env:{found[1]},VALUE}}."
        )
    return f"{reason}. ${{…}} stands for another key's value; write \\${{…}} for the characters themselves."


def _read_yaml_file(path: Path) -> dict[str, Any]:
    content = read_yaml(read_text(path, "configuration file"), Config, str(path))
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
    if key[-1:].isspace():  # key = value: the blanks belong to neither
        value_text = value_text.strip()
    annotation, place = annotation_at(parts), f"override {text!r}"
    value: Any
    if text_type(annotation):
        value = override_text(value_text, annotation, place)
    else:
        value = read_yaml(value_text, annotation, place, is_override=True) if value_text.strip() else ""
    for part in reversed(parts):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def resolved_yaml(config: Config) -> str:
    """Every key with its value; `load_config` reads it back to an equal Config, whatever the preset says by then.

    What came from an environment variable stands there as the reference that the configuration had.
    """
    return OmegaConf.to_yaml(OmegaConf.create(written_values(config, literal=_escaped)))


def _escaped(text: str) -> str:
    """Text in which ${...} means itself."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def save_resolved(config: Config, folder: str | Path) -> Path:
    """Write `resolved_yaml` to config.yaml in the run's folder, which is made if need be; its paths are absolute."""
    path = Path(folder) / "config.yaml"
    write_text_whole(path, resolved_yaml(with_absolute_paths(config)))
    return path
