"""Questions with their reference answers, out of files and out of generators, before any formatting."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, TypeAlias, overload

import pyarrow.parquet as parquet

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data.chain_arithmetic import ChainArithmetic


@dataclass(frozen=True)
class Record:
    """One question.

    Attributes:
        prompt: the question as text, or as chat messages with "role" and "content".
        reference: what the verifier compares with.
        place: where it comes from, for error messages: "train.jsonl:17".
    """

    prompt: str | list[dict[str, str]]
    reference: Any
    place: str


RecordGenerator: TypeAlias = Callable[[int, int], Record]
"""(index, attempt) -> Record, pure: item `index` of a procedural source; other attempts give replacements for it."""


def read_records(source: DataSourceConfig) -> Sequence[Record]:
    """Read a jsonl or parquet source, at most its first `num_prompts` rows.

    Raises:
        ValueError: if the file does not exist, holds no prompt or a malformed row, or lacks a column.
    """
    path = Path(source.path)
    if not path.is_file():
        raise ValueError(f"prompt file {source.path!r} does not exist (looked for {path.resolve()})")
    records = _read_jsonl(path, source) if source.kind == "jsonl" else _ParquetRecords(path, source)
    if not records:
        raise ValueError(f"prompt file {source.path} holds no prompts")
    return records


def record_generator(source: DataSourceConfig, seed: int) -> RecordGenerator:
    """Generator of a chain_arithmetic or reasoning_gym source.

    Raises:
        ValueError: for parameters or a task that do not exist.
    """
    if source.kind == "chain_arithmetic":
        return _chain_arithmetic(source.params, seed)
    return _reasoning_gym(source.task, source.params, seed)


def _read_jsonl(path: Path, source: DataSourceConfig) -> list[Record]:
    records: list[Record] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if len(records) == source.num_prompts:
                break
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{place} is not valid JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place} holds a JSON {type(row).__name__}; every line is an object with columns")
            records.append(_record(row, source, place))
    return records


class _ParquetRecords(Sequence[Record]):
    """Rows of a parquet file, made when asked for: as Python objects, millions of them would fill the memory."""

    def __init__(self, path: Path, source: DataSourceConfig) -> None:
        names = parquet.read_schema(path).names
        columns = []
        for name in (source.prompt_field, source.answer_field):
            column = name if name in names else name.split(".")[0]
            if column not in names:
                raise ValueError(_missing_column(name, names, str(path)))
            columns.append(column)
        # Only the columns in use: some data sets carry others that are many times larger.
        table = parquet.read_table(path, columns=list(dict.fromkeys(columns)))
        self._table = table.slice(0, source.num_prompts).combine_chunks()
        self._source = source
        self._path = path

    def __len__(self) -> int:
        num_rows: int = self._table.num_rows
        return num_rows

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[index] for index in range(len(self))[row]]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return _record(self._table.slice(row, 1).to_pylist()[0], self._source, f"{self._path}, row {row}")


def _record(row: Mapping[str, Any], source: DataSourceConfig, place: str) -> Record:
    prompt = _column(row, source.prompt_field, place)
    reference = _column(row, source.answer_field, place)
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise ValueError(
            f"{place}: column {source.prompt_field!r} holds {prompt!r:.100}; a prompt is a text that is not empty, "
            "or a list of chat messages with role and content"
        )
    if reference is None:
        raise ValueError(f"{place}: column {source.answer_field!r} is null; every prompt needs a reference answer")
    return Record(prompt, reference, place)


def _column(row: Mapping[str, Any], name: str, place: str) -> Any:
    """Value of a column; a dot descends into a struct unless a column has that very name."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(_missing_column(name, _column_names(row), place))
        value = value[part]
    return value


def _column_names(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of all columns, those inside structs with dots."""
    names = []
    for name, value in row.items():
        names.append(prefix + name)
        if isinstance(value, Mapping):
            names += _column_names(value, f"{prefix}{name}.")
    return names


def _missing_column(name: str, existing: Sequence[str], place: str) -> str:
    return (
        f"{place} has no column {name!r}; it has {', '.join(existing) or 'none'}.{nearest_name(name, existing)} "
        "Set prompt_field and answer_field of the data source."
    )


def nearest_name(name: str, known: Sequence[str]) -> str:
    """ " Did you mean 'x'?" if a known name is near, else nothing."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _chain_arithmetic(params: Mapping[str, Any], seed: int) -> RecordGenerator:
    try:
        task = ChainArithmetic(**params)
    except TypeError as error:
        raise ValueError(f"chain_arithmetic has the parameter num_terms; got {dict(params)}") from error

    def generate(index: int, attempt: int) -> Record:
        problem = task.draw(Random(f"chain_arithmetic/{seed}/{index}/{attempt}"))
        return Record(problem.prompt, problem.answer, f"chain_arithmetic, item {index}")

    return generate


_ATTEMPT_STRIDE = 2**20
"""Distance between the attempts at one item in a reasoning-gym task's numbering: room for a million items."""

_SHARD_SIZE = 1024
"""Items made by one data set object; some tasks allocate a list of that length."""


def _reasoning_gym(task: str, params: Mapping[str, Any], seed: int) -> RecordGenerator:
    # Imported here: it takes a second, which runs without such a source need not wait for.
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}.{nearest_name(task, list(DATASETS))}")
    reserved = sorted({"seed", "size"} & params.keys())
    if reserved:
        raise ValueError(
            f"{reserved[0]!r} is not a parameter of task {task}: the data source sets it (seed, num_prompts)"
        )
    # Item i of seed s is item 0 of seed s + i, so seeds are spread over a range that runs do not bridge.
    first = int.from_bytes(hashlib.sha256(f"{task}/{seed}".encode()).digest()[:8], "big") % 2**31

    @lru_cache(maxsize=64)
    def shard(number: int) -> Any:
        return reasoning_gym.create_dataset(task, seed=first + number * _SHARD_SIZE, size=_SHARD_SIZE, **params)

    try:
        shard(0)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym task {task} does not take the parameters {dict(params)}: {error}") from error

    def generate(index: int, attempt: int) -> Record:
        # Modulo 2^31: some tasks seed numpy, which takes 32 bits.
        number, offset = divmod((index + attempt * _ATTEMPT_STRIDE) % 2**31, _SHARD_SIZE)
        entry = shard(number)[offset]
        reference = {"task": task, "params": dict(params), "entry": entry}
        return Record(entry["question"], reference, f"reasoning-gym task {task}, item {index}")

    return generate
