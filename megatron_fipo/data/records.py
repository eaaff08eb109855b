"""Questions with their reference answers, out of files and out of generators, before any formatting."""

from __future__ import annotations

import bisect
import difflib
import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, TypeAlias, overload

import pyarrow as pa
import pyarrow.parquet as parquet

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data.chain_arithmetic import ChainArithmetic
from megatron_fipo.data.schemas import SCHEMAS, select_columns
from megatron_fipo.hub.datasets import FetchedSource, fetched_here, file_kind


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


@dataclass(frozen=True)
class RecordFile:
    """What a file holds.

    Attributes:
        records: its rows without repeated prompts, at most the source's num_prompts.
        num_duplicates: rows left out because an earlier one has the same prompt.
        num_conflicts: those among them whose reference differs from the first one's.
    """

    records: Sequence[Record]
    num_duplicates: int
    num_conflicts: int


def read_records(source: DataSourceConfig) -> RecordFile:
    """Read a jsonl or parquet source, or one of the hub, fetching it where it has not been.

    Raises:
        ValueError: if the file does not exist, holds no prompt or a malformed row, or lacks a column.
    """
    if source.kind == "hub":
        return _read_hub(fetched_here(source))
    path = Path(source.path)
    if not path.is_file():
        raise ValueError(f"prompt file {source.path!r} does not exist (looked for {path.resolve()})")
    repeats = _Repeats(source.deduplicate)
    read = _read_jsonl if source.kind == "jsonl" else _ParquetRecords
    records = read(path, source, repeats)
    if not records:
        raise ValueError(f"prompt file {source.path} holds no prompts")
    return RecordFile(records, repeats.num_duplicates, repeats.num_conflicts)


def _read_hub(source: FetchedSource) -> RecordFile:
    """The rows of a split's files, one after the other."""
    repeats, parts, num_left = _Repeats(source.deduplicate), [], source.num_prompts
    for file in source.files:
        if num_left == 0:
            break
        read = _read_jsonl if file_kind(file) == "jsonl" else _ParquetRecords
        parts.append(read(Path(file), replace(source, num_prompts=num_left), repeats))
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
        """Whether this prompt is the first of its kind, white space at its ends aside; counts it if it is not."""
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


def _read_jsonl(path: Path, source: DataSourceConfig, repeats: _Repeats) -> list[Record]:
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
            record = _record(row, source, place)
            if repeats.is_new(record):
                records.append(record)
    return records


_PARQUET_BATCH = 4096


class _ParquetRecords(Sequence[Record]):
    """Rows of a parquet file, made when asked for: as Python objects, millions of them would fill the memory."""

    def __init__(self, path: Path, source: DataSourceConfig, repeats: _Repeats) -> None:
        self._source = source
        self._path = path
        kept: list[pa.RecordBatch] = []
        self._rows = array("q")
        """Row in the file of each record."""
        with parquet.ParquetFile(path) as file:
            columns = _parquet_columns(file.schema_arrow.names, source, str(path))
            start = 0
            # Only the columns in use: some data sets carry others that are many times larger.
            for batch in file.iter_batches(_PARQUET_BATCH, columns=columns):
                new = [i for i, row in enumerate(batch.to_pylist()) if repeats.is_new(self._record(row, start + i))]
                if source.num_prompts is not None:
                    new = new[: source.num_prompts - len(self._rows)]
                kept.append(batch.take(pa.array(new, pa.int64())))
                self._rows.extend(start + i for i in new)
                start += batch.num_rows
                if len(self._rows) == source.num_prompts:
                    break
            self._table = pa.Table.from_batches(kept, schema=kept[0].schema if kept else None).combine_chunks()

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
        return _record(row, self._source, f"{self._path}, row {number}")


def _parquet_columns(names: Sequence[str], source: DataSourceConfig, place: str) -> list[str]:
    """The file's columns that the source reads."""
    if source.schema != "columns":
        return list(select_columns(SCHEMAS[source.schema], names, place).values())
    columns = []
    for name in (source.prompt_field, source.answer_field):
        column = name if name in names else name.split(".")[0]
        if column not in names:
            raise ValueError(_missing_column(name, names, place))
        columns.append(column)
    return list(dict.fromkeys(columns))


def _record(row: Mapping[str, Any], source: DataSourceConfig, place: str) -> Record:
    if source.schema == "columns":
        prompt, reference = _column(row, source.prompt_field, place), _column(row, source.answer_field, place)
        prompt_name, reference_name = f"column {source.prompt_field!r}", f"column {source.answer_field!r}"
    else:
        schema = SCHEMAS[source.schema]
        names = select_columns(schema, list(row), place)
        prompt, reference = schema.read({name: row[column] for name, column in names.items()})
        prompt_name, reference_name = f"the prompt (schema {source.schema})", f"the answer (schema {source.schema})"
    is_chat = isinstance(prompt, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )
    if not prompt or not (isinstance(prompt, str) or is_chat):
        raise ValueError(
            f"{place}: {prompt_name} holds {prompt!r:.100}; a prompt is a text that is not empty, "
            "or a list of chat messages with role and content"
        )
    if reference is None:
        raise ValueError(f"{place}: {reference_name} is null; every prompt needs a reference answer")
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

    from megatron_fipo.rl.verifiers.reasoning_gym_tasks import open_task

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
