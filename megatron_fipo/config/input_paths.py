"""Files and folders that a configuration names to read from: where a relative path starts, and what is recorded.

A relative path starts from the current folder. What is not there is looked for in the folder of the configuration file,
so that a configuration with its model and data beside it works from anywhere. Names on the Hugging Face hub are no
paths: they stay as they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from megatron_fipo.config.errors import ConfigError, Problem
from megatron_fipo.config.sections import Config, DataSourceConfig
from megatron_fipo.config.sections.data import FILE_KINDS
from megatron_fipo.config.text_rules import REPOSITORY_NAME

_INPUT_KEY = re.compile(r"model\.path|data\.(train|evaluation)\..+\.path|servers\.python")


def find_inputs(config: Config, config_file: str | Path | None) -> Config:
    """The configuration; relative paths that only the configuration file's folder has start from there."""
    if config_file is None:
        return config
    folder = Path(config_file).parent

    def found(key: str, path: str) -> str:
        beside = folder / path
        if _is_here(path):
            return path
        if os.path.exists(beside):
            return str(beside)
        if _is_model_on_hub(key, path) and (folder / path.split("/")[0]).is_dir():
            return os.path.abspath(beside)  # a mistyped path rather than a name on the hub
        return path

    return _map_inputs(config, found)


def require_inputs(config: Config, config_file: str | Path, unread: tuple[str, ...] = ()) -> None:
    """Refuse relative paths that lead nowhere; absolute paths are checked where they are read.

    Args:
        unread: prefixes of keys whose files will not be read.

    Raises:
        ConfigError: naming both places where each was looked for.
    """
    folder, name = Path(config_file).parent.absolute(), Path(config_file).name
    problems = [
        Problem(
            key,
            path,
            f"there is neither {Path.cwd() / path} (from the current folder) nor {folder / path} (from the folder of "
            f"{name})",
            "Put it there, or name where it is",
        )
        for key, path in _inputs(config)
        if not _is_here(path) and not _is_model_on_hub(key, path) and not key.startswith(unread)
    ]
    if problems:
        raise ConfigError.of(problems)


def places_of_relative_paths(config_file: str | Path) -> str:
    """A sentence that says where relative paths start."""
    places = list(dict.fromkeys([Path.cwd(), Path(config_file).parent.resolve()]))
    return f"Relative paths were looked for in {' and then in '.join(map(str, places))}."


def with_absolute_paths(config: Config) -> Config:
    """The configuration to record: it names the same files and output folder wherever it is read from.

    A name that is no file or folder here stays as it is.
    """
    run = replace(config.run, output_dir=os.path.abspath(config.run.output_dir))
    return _map_inputs(replace(config, run=run), lambda _, path: os.path.abspath(path) if _exists(path) else path)


def same_place(key: str, value: object) -> object:
    """One spelling for all paths that lead to the same file or folder; other keys' values as they are.

    Args:
        key: the value's dotted key.
    """
    if isinstance(value, str) and (key == "run.output_dir" or (_INPUT_KEY.fullmatch(key) and _exists(value))):
        return os.path.realpath(value)
    return value


def is_hub_name(path: str) -> bool:
    """Whether a model's path is a name on the hub rather than a folder.

    A folder here goes before the hub, and a name whose first part is a folder here ("outputs/typo") is a path: a typing
    error must not fetch a stranger's model.
    """
    return bool(REPOSITORY_NAME.fullmatch(path)) and not Path(path).exists() and not Path(path.split("/")[0]).is_dir()


def _is_model_on_hub(key: str, path: str) -> bool:
    return key == "model.path" and is_hub_name(path)


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(path)


def _is_here(path: str) -> bool:
    """Whether a path is empty, absolute, or exists from the current folder."""
    return not path or os.path.isabs(path) or os.path.exists(path)


def _inputs(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of every path to read from, and the model's name on the hub where it has one."""
    found: list[tuple[str, str]] = []

    def note(key: str, path: str) -> str:
        found.append((key, path))
        return path

    _map_inputs(config, note)
    yield from found


def _map_inputs(config: Config, change: Callable[[str, str], str]) -> Config:
    """A configuration whose paths to read from went through a function of key and value."""

    def sources(part: str, given: dict[str, DataSourceConfig]) -> dict[str, DataSourceConfig]:
        return {
            name: replace(source, path=change(f"data.{part}.{name}.path", source.path))
            if source.kind in FILE_KINDS and source.kind != "hub"
            else source
            for name, source in given.items()
        }

    python, starts_servers = config.servers.python, config.rollout.engine != "in_process" and not config.servers.urls
    if starts_servers and python and os.sep in python:  # a bare name is looked for in PATH
        python = change("servers.python", python)
    return replace(
        config,
        model=replace(config.model, path=change("model.path", config.model.path)),
        data=replace(
            config.data,
            train=sources("train", config.data.train),
            evaluation=sources("evaluation", config.data.evaluation),
        ),
        servers=replace(config.servers, python=python),
    )
