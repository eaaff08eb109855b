"""The trace files of a run: one for each update that saw a chosen trajectory.

    traces/step_000040_update_003.parquet

A file is written whole as soon as its update is made. A run that goes on between two updates of a step finds those of
the updates before, and writes the others anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_fipo.system.disk import put_file_in_place, writing
from megatron_fipo.traces.schema import FLOAT_COLUMNS, FORMAT, TOKEN_COLUMNS, TracedResponse, arrow_schema, columns

_FILE = re.compile(r"step_(\d+)_update_(\d+)\.parquet")
_FORMAT_KEY, _OBJECTIVE_KEY = "megatron_fipo.trace_format", "megatron_fipo.objective"


@dataclass(frozen=True)
class TraceFile:
    """What a file holds.

    Attributes:
        path: where it lies.
        objective: the settings of the objective, by key.
        responses: in the order of the batch.
    """

    path: Path
    objective: Mapping[str, Any]
    responses: Sequence[TracedResponse]


def path_of(folder: Path, step: int, update: int) -> Path:
    """The file of an update."""
    return folder / f"step_{step:06d}_update_{update:03d}.parquet"


def write_trace(folder: Path, responses: Sequence[TracedResponse], objective: Mapping[str, Any]) -> Path:
    """Write an update's file, whole or not at all; one of the same update gives way.

    Args:
        responses: at least one, all of one update.
        objective: the objective's settings.

    Raises:
        DiskError: if it cannot be written.
    """
    path = path_of(folder, responses[0].step, responses[0].update)
    schema = arrow_schema({_FORMAT_KEY: str(FORMAT), _OBJECTIVE_KEY: json.dumps(dict(objective))})
    table = pa.Table.from_arrays(
        [_array([getattr(one, field.name) for one in responses], field.type) for field in schema], schema=schema
    )
    floats = [f"{name}.list.element" for name in FLOAT_COLUMNS]
    others = [name for name, kind, _ in columns() if name not in FLOAT_COLUMNS and not pa.types.is_list(kind)]
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.name}.partial")
        pq.write_table(
            table,
            unfinished,
            compression="zstd",
            use_dictionary=[*others, "texts.list.element", "left_out_tokens.list.element"],
            use_byte_stream_split=floats,  # the bytes of floats that are alike lie together, and compress
        )
        put_file_in_place(unfinished, path)
    return path


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_list(kind):
        return _strings(values) if kind == pa.string() else pa.array(values, kind)
    offsets = np.cumsum([0, *(len(one) for one in values)], dtype=np.int32)
    if kind.value_type == pa.string():
        flat = _strings([text for one in values for text in one])
    else:
        flat = pa.array(np.concatenate(values), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)


def _strings(texts: Sequence[str]) -> pa.Array:
    """The texts; a lone surrogate, which some data have and UTF-8 has not, is written as JSON escapes it."""
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([text.encode("utf-8", "backslashreplace").decode() for text in texts], pa.string())


def trace_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The files by step and update, in order."""
    found = {(int(match[1]), int(match[2])): path for path in folder.glob("*") if (match := _FILE.fullmatch(path.name))}
    return dict(sorted(found.items()))


def forget_traces(folder: Path, first_step: int, first_update: int = 0) -> None:
    """Delete the files of updates that will be made again, from one of a step on, and what was not finished.

    Raises:
        DiskError: if one cannot be deleted.
    """
    with writing(folder):
        for (step, update), path in trace_files(folder).items():
            if (step, update) >= (first_step, first_update):
                path.unlink()
        for path in folder.glob("*.parquet.partial"):
            path.unlink()


def read_trace(path: Path) -> TraceFile:
    """Read one file.

    Raises:
        ValueError: if it cannot be read, is no trace, or one of a later version.
    """
    try:
        with path.open("rb") as file:
            table = pq.read_table(file)
    except pa.ArrowException as error:
        raise _no_trace(path, str(error)) from error
    except OSError as error:
        if error.errno is None:  # Arrow's, of a file whose content is no parquet
            raise _no_trace(path, str(error)) from error
        raise ValueError(
            f"{path} cannot be read: {error.strerror}. Mend that, or look again: a run that goes on writes its newest "
            "traces anew."
        ) from error
    metadata = table.schema.metadata or {}
    try:
        number = int(metadata[_FORMAT_KEY.encode()])
        objective = json.loads(metadata[_OBJECTIVE_KEY.encode()])
    except (LookupError, ValueError) as error:
        raise _no_trace(path, f"its metadata have no {_FORMAT_KEY} and {_OBJECTIVE_KEY} of a trace") from error
    if number > FORMAT:
        raise ValueError(
            f"{path} is a trace of format {number}; this version of megatron_fipo reads formats up to {FORMAT}. "
            "Read it with the version that wrote it, or a later one."
        )
    given = {name: _values(path, table, name, kind) for name, kind, _ in columns()}
    rows = [{name: values[row] for name, values in given.items()} for row in range(table.num_rows)]
    responses = [TracedResponse(**row) for row in rows]
    for one in responses:
        for name in TOKEN_COLUMNS:
            if len(getattr(one, name)) != one.num_tokens:
                raise _no_trace(
                    path, f"a response of {one.num_tokens} tokens has {len(getattr(one, name))} entries in {name}"
                )
    return TraceFile(path, objective, responses)


def _no_trace(path: Path, reason: str) -> ValueError:
    return ValueError(f"{path} is no trace, or is damaged: {' '.join(reason.split())}. Delete it to read the others.")


def _values(path: Path, table: pa.Table, name: str, kind: pa.DataType) -> list[Any]:
    if table.schema.get_field_index(name) < 0:
        raise _no_trace(path, f"it has no column {name}")
    column = table.column(name).combine_chunks()
    if column.type != kind or column.null_count:
        raise _no_trace(path, f"its column {name} holds {column.type}, or nothing somewhere, and not {kind}")
    if not pa.types.is_list(kind) or kind.value_type == pa.string():
        return list(column.to_pylist())
    return [one.values.to_numpy(zero_copy_only=False) for one in column]


def num_bytes_per_token() -> int:
    """Bytes of a token in memory without its text, before compression."""
    return sum(
        kind.value_type.bit_width // 8 if kind.value_type != pa.bool_() else 1
        for name, kind, _ in columns()
        if name in TOKEN_COLUMNS and kind.value_type != pa.string()
    )
