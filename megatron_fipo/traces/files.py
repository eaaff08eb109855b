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
        return pa.array(values, kind)
    offsets = np.cumsum([0, *(len(one) for one in values)], dtype=np.int32)
    if kind.value_type == pa.string():
        flat = pa.array([text for one in values for text in one], pa.string())
    else:
        flat = pa.array(np.concatenate(values), kind.value_type)
    return pa.ListArray.from_arrays(pa.array(offsets), flat, type=kind)


def trace_files(folder: Path) -> dict[tuple[int, int], Path]:
    """The files by step and update, in order."""
    found = {(int(match[1]), int(match[2])): path for path in folder.glob("*") if (match := _FILE.fullmatch(path.name))}
    return dict(sorted(found.items()))


def forget_traces(folder: Path, first_step: int, first_update: int = 0) -> None:
    """Delete the files of updates that will be made again, from one of a step on, and what was not finished."""
    for (step, update), path in trace_files(folder).items():
        if (step, update) >= (first_step, first_update):
            path.unlink()
    for path in folder.glob("*.parquet.partial"):
        path.unlink()


def read_trace(path: Path) -> TraceFile:
    """Read one file.

    Raises:
        ValueError: if it is no trace, or one of a later version.
    """
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        number = int(metadata[_FORMAT_KEY.encode()])
        if number > FORMAT:
            raise ValueError(
                f"{path} is a trace of format {number}; this version of megatron_fipo reads formats up to {FORMAT}. "
                "Read it with the version that wrote it, or a later one."
            )
        objective = json.loads(metadata[_OBJECTIVE_KEY.encode()])
        given = {name: _values(table.column(name).combine_chunks(), kind) for name, kind, _ in columns()}
    except (pa.ArrowException, LookupError, OSError) as error:
        raise ValueError(f"{path} is no trace, or is damaged: {error}. Delete it to read the others.") from error
    rows = [{name: values[row] for name, values in given.items()} for row in range(table.num_rows)]
    return TraceFile(path, objective, [TracedResponse(**row) for row in rows])


def _values(column: pa.Array, kind: pa.DataType) -> list[Any]:
    if not pa.types.is_list(kind):
        return list(column.to_pylist())
    if kind.value_type == pa.string():
        return list(column.to_pylist())
    return [one.values.to_numpy(zero_copy_only=False) for one in column]


def num_bytes_per_token() -> int:
    """Bytes of a token in memory without its text, before compression."""
    return sum(
        kind.value_type.bit_width // 8 if kind.value_type != pa.bool_() else 1
        for name, kind, _ in columns()
        if name in TOKEN_COLUMNS and kind.value_type != pa.string()
    )
