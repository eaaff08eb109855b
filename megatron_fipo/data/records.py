"""Questions with their reference answers, from files and from generators, before any formatting."""

from __future__ import annotations

import base64
import bisect
import hashlib
import itertools
import json
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, TypeAlias, overload

import pyarrow as pa

from megatron_fipo.config import DataSourceConfig, verifier_weights
from megatron_fipo.data.chain_arithmetic import ChainArithmetic
from megatron_fipo.data.prompt_files import check_file, json_rows, open_parquet, parquet_batches
from megatron_fipo.data.references import check_characters, checked_reference
from megatron_fipo.data.row_forms import ROW_FORMS, select_columns
from megatron_fipo.hub.datasets import FetchedSource, fetched_here, file_kind
from megatron_fipo.system.nearest_name import did_you_mean


@dataclass(frozen=True)
class Record:
    """One question.

    Attributes:
        prompt: the question as text, or as chat messages with "role" and "content".
        reference: what the verifier compares with.
        place: where it comes from, for error messages: "train.jsonl:17".
        row: all its columns, where they are asked for.
    """

    prompt: str | list[dict[str, str]]
    reference: Any
    place: str
    row: dict[str, Any] | None = None


RecordGenerator: TypeAlias = Callable[[int, int], Record]
"""(index, attempt) -> Record, pure: item `index` of a procedural source; other attempts give replacements for it."""


@dataclass(frozen=True)
class RecordFile:
    """The records of a file.

    Attributes:
        records: its rows without repeated prompts, at most the source's num_prompts.
        num_duplicates: rows left out because an earlier one has the same prompt.
        num_conflicts: those among them whose reference differs from the first one's.
    """

    records: Sequence[Record]
    num_duplicates: int
    num_conflicts: int


def read_records(source: DataSourceConfig, with_rows: bool = False) -> RecordFile:
    """Read a jsonl or parquet source, or one of the hub, which is fetched if the cache lacks it.

    Args:
        with_rows: keep all columns of each row beside the question, for a verifier that asks for them.

    Raises:
        ValueError: if the file does not exist, is not of its kind, holds no prompt or a malformed row, lacks a column,
            or has a reference that no answer can equal (`references`); the message names file and row.
    """
    if source.kind == "hub":
        return _read_hub(fetched_here(source), with_rows)
    path = Path(source.path)
    check_file(path, source.kind)
    repeats = _Repeats(source.deduplicate)
    read = _read_jsonl if source.kind == "jsonl" else _ParquetRecords
    records = read(path, source, repeats, with_rows)
    if not records:
        raise ValueError(f"prompt file {source.path} holds no prompts")
    return RecordFile(records, repeats.num_duplicates, repeats.num_conflicts)


def _read_hub(source: FetchedSource, with_rows: bool) -> RecordFile:
    """The rows of a split's files, one after the other."""
    repeats, parts, num_left = _Repeats(source.deduplicate), [], source.num_prompts
    for file in source.files:
        if num_left == 0:
            break
        kind = file_kind(file)
        check_file(Path(file), kind)
        read = _read_jsonl if kind == "jsonl" else _ParquetRecords
        parts.append(read(Path(file), replace(source, num_prompts=num_left), repeats, with_rows))
        num_left = None if num_left is None else num_left - len(parts[-1])
    records = _Joined(parts)
    if not records:
        raise ValueError(f"split {source.split} of {source.path} holds no prompts")
    return RecordFile(records, repeats.num_duplicates, repeats.num_conflicts)


class _Joined(Sequence[Record]):
    """Several files' records, one after the other."""

    def __init__(self, parts: Sequence[Sequence[Record]]) -> None:
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[index] for index in range(len(self))[row]]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = bisect.bisect_right(self._ends, row)
        return self._parts[number][row - (self._ends[number] - len(self._parts[number]))]


class _Repeats:
    """Notices prompts that came up before; keeps 24 bytes of each."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._references: dict[bytes, bytes] = {}
        self.num_duplicates = 0
        self.num_conflicts = 0

    def is_new(self, record: Record) -> bool:
        """Whether this prompt has not come before, white space at its ends aside; counts it as a repeat if it has."""
        if not self._enabled:
            return True
        prompt = record.prompt.strip() if isinstance(record.prompt, str) else repr(record.prompt)
        key = hashlib.blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        reference = hashlib.blake2b(repr(record.reference).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        first = self._references.setdefault(key, reference)
        if first is reference:
            return True
        self.num_duplicates += 1
        self.num_conflicts += first != reference
        return False


def record_generator(source: DataSourceConfig, seed: int) -> RecordGenerator:
    """Generator of a chain_arithmetic or reasoning_gym source.

    Raises:
        ValueError: for parameters or a task that do not exist.
    """
    if source.kind == "chain_arithmetic":
        return _chain_arithmetic(source.params, seed)
    return _reasoning_gym(source.task, source.params, seed)


def _read_jsonl(path: Path, source: DataSourceConfig, repeats: _Repeats, with_rows: bool) -> list[Record]:
    records: list[Record] = []
    for place, row in json_rows(path):
        if len(records) == source.num_prompts:
            break
        record = _record(row, source, place, with_rows)
        if repeats.is_new(record):
            records.append(record)
    return records


_PARQUET_BATCH = 4096


class _ParquetRecords(Sequence[Record]):
    """Rows of a parquet file, made on access: as Python objects, millions of them would fill the memory."""

    def __init__(self, path: Path, source: DataSourceConfig, repeats: _Repeats, with_rows: bool) -> None:
        self._source, self._with_rows = source, with_rows
        self._path = path
        kept: list[pa.RecordBatch] = []
        self._rows = array("q")
        """Row in the file of each record."""
        with open_parquet(path) as file:
            columns = _parquet_columns(file.schema_arrow.names, source, str(path))
            start = 0
            # Only the columns in use: some data sets carry others that are many times larger.
            for batch in parquet_batches(file, path, None if with_rows else columns, _PARQUET_BATCH):
                new = [i for i, row in enumerate(batch.to_pylist()) if repeats.is_new(self._record(row, start + i))]
                if source.num_prompts is not None:
                    new = new[: source.num_prompts - len(self._rows)]
                kept.append(batch.take(pa.array(new, pa.int64())))
                self._rows.extend(start + i for i in new)
                start += batch.num_rows
                if len(self._rows) == source.num_prompts:
                    break
        self._table = pa.Table.from_batches(kept).combine_chunks() if kept else pa.table({})

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, row: int) -> Record: ...
    @overload
    def __getitem__(self, row: slice) -> list[Record]: ...
    def __getitem__(self, row: int | slice) -> Record | list[Record]:
        if isinstance(row, slice):
            return [self[index] for index in range(len(self))[row]]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._record(self._table.slice(row, 1).to_pylist()[0], self._rows[row])

    def _record(self, row: Mapping[str, Any], number: int) -> Record:
        return _record(row, self._source, f"{self._path}, row {number}", self._with_rows)


def _parquet_columns(names: Sequence[str], source: DataSourceConfig, place: str) -> list[str]:
    """The file's columns that the source reads."""
    if source.schema != "columns":
        return _given_once(list(select_columns(ROW_FORMS[source.schema], names, place).values()), names, place)
    columns: list[str] = []
    for name in (source.prompt_field, source.answer_field):
        column = name if name in names else name.split(".")[0]
        if column not in names:
            raise ValueError(_missing_column(name, names, place))
        columns.append(column)
    return _given_once(list(dict.fromkeys(columns)), names, place)


def _given_once(columns: list[str], names: Sequence[str], place: str) -> list[str]:
    for column in columns:
        if names.count(column) > 1:
            raise ValueError(f"{place} has {names.count(column)} columns {column!r}; which one counts cannot be told")
    return columns


def _record(row: Mapping[str, Any], source: DataSourceConfig, place: str, with_row: bool) -> Record:
    if source.schema == "columns":
        prompt, reference = _column(row, source.prompt_field, place), _column(row, source.answer_field, place)
        prompt_name, reference_name = f"column {source.prompt_field!r}", f"column {source.answer_field!r}"
    else:
        form = ROW_FORMS[source.schema]
        names = select_columns(form, list(row), place)
        try:
            prompt, reference = form.read({name: row[column] for name, column in names.items()})
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        prompt_name, reference_name = f"the prompt (schema {source.schema})", f"the answer (schema {source.schema})"
    prompt = _from_json_text(prompt, _is_chat)
    if not prompt or not (isinstance(prompt, str) or _is_chat(prompt)):
        raise ValueError(
            f"{place}: {prompt_name} holds {prompt!r:.100}; a prompt is a text that is not empty, "
            "or a list of chat messages with role and content"
        )
    if isinstance(prompt, str) and _PYTHON_CHAT.match(prompt):
        raise ValueError(
            f"{place}: {prompt_name} holds Python's text of chat messages ({prompt[:60]!r}…), which a model would read "
            "as it stands. Write the messages themselves, or their JSON (json.dumps, not str)"
        )
    try:
        for text in (
            [prompt]
            if isinstance(prompt, str)
            else [text for message in prompt for text in (message["role"], message["content"])]
        ):
            check_characters(text, prompt_name)
        reference = checked_reference(reference, list(verifier_weights(source)), reference_name)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
    return Record(prompt, reference, place, {name: _plain(value) for name, value in row.items()} if with_row else None)


_PYTHON_CHAT = re.compile(r"""\s*\[\s*\{\s*'(?:role|content)'\s*:\s*['"]""")
"""The beginning of a list of messages that `str` turned into text, as pandas does for CSV."""


def _plain(value: Any) -> Any:
    """A column's value as JSON can hold it: a date or a decimal number as its text, bytes in base64."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _is_chat(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )


def _from_json_text(value: Any, is_wanted: Callable[[Any], bool]) -> Any:
    """A structure that travelled as JSON text, as in tables whose cells hold text only; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:2] not in ("[{", '{"'):
        return value
    try:
        structure = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return structure if is_wanted(structure) else value


def _column(row: Mapping[str, Any], name: str, place: str) -> Any:
    """Value of a column; a dot descends into a struct unless a column has that very name."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        value = _from_json_text(value, lambda structure: isinstance(structure, dict))
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
        f"{place} has no column {name!r}; it has {', '.join(existing) or 'none'}.{did_you_mean(name, existing)} "
        "Set prompt_field and answer_field of the data source."
    )


def _chain_arithmetic(params: Mapping[str, Any], seed: int) -> RecordGenerator:
    try:
        task = ChainArithmetic(**params)
    except TypeError as error:
        raise ValueError(f"chain_arithmetic has the parameters num_terms and min_terms; got {dict(params)}") from error

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
    from reasoning_gym.factory import DATASETS

    from megatron_fipo.verifiers.reasoning_gym_tasks import open_task

    if task not in DATASETS:
        raise ValueError(f"reasoning-gym has no task {task!r}.{did_you_mean(task, DATASETS)}")
    reserved = sorted({"seed", "size"} & params.keys())
    if reserved:
        raise ValueError(
            f"{reserved[0]!r} is not a parameter of task {task}: the data source sets it (seed, num_prompts)"
        )
    # Item i of seed s is item 0 of seed s + i, so seeds are hashed far apart: the items of two runs do not overlap.
    first = int.from_bytes(hashlib.sha256(f"{task}/{seed}".encode()).digest()[:8], "big") % 2**31

    @lru_cache(maxsize=64)
    def shard(number: int) -> Any:
        return open_task(task, params, seed=first + number * _SHARD_SIZE, size=_SHARD_SIZE)

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
