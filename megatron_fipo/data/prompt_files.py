"""Opens files of prompts; names the real format of a file that is not of the stated kind."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

_PARQUET = b"PAR1"
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gzip -d"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"\xfd7zXZ\x00": ("xz", "xz -d"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_OTHER_FORMATS = {
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"SQLite format 3": "an SQLite database",
    b"\x80\x04\x95": "a Python pickle",
    b"\x93NUMPY": "a NumPy file",
}


def check_file(path: Path, kind: str) -> None:
    """Refuse a file whose first bytes are not those of its kind.

    Raises:
        ValueError: naming the file, what it is and what to do.
    """
    try:
        if path.is_dir():
            raise ValueError(f"prompt file {path} is a folder{_files_inside(path)}. Name one file.")
        if not path.is_file():
            raise ValueError(f"prompt file {str(path)!r} does not exist (looked for {os.path.realpath(path)})")
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise ValueError(f"prompt file {path} cannot be read: {error.strerror}") from error
    if what := _misfit(start, kind):
        raise ValueError(f"prompt file {path} {what}")


def _files_inside(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".parquet", ".jsonl", ".json"))
    return f", which holds {', '.join(names[:3])}{', …' * (len(names) > 3)}" if names else ""


def _misfit(start: bytes, kind: str) -> str:
    """Name what a file with these first bytes really is; empty if it may be of its kind."""
    if not start:
        return "holds no prompts: it is empty (0 bytes), as after a download that broke off. Fetch it again."
    if start.startswith(_LFS_POINTER):
        return "is a Git LFS pointer and not the data itself. Fetch that with `git lfs pull` in its repository."
    for mark, (name, command) in _COMPRESSED.items():
        if start.startswith(mark):
            return f"is compressed by {name}. Unpack it ({command}) and name the file that comes out."
    for mark, name in _OTHER_FORMATS.items():
        if start.startswith(mark):
            return f"is {name}. Write the rows as parquet or as JSON lines."
    if kind == "parquet":
        return _no_parquet(start)
    if start.startswith(_PARQUET):
        return "is a parquet file. Set kind=parquet."
    if start.startswith(_UTF16_MARKS) or b"\x00" in start:
        return "is not UTF-8 (UTF-16, or no text at all). `iconv -f UTF-16 -t UTF-8` turns UTF-16 into that."
    if start.lstrip()[:9].lower() in (b"<!doctype", b"<html>") or start.lstrip()[:6].lower() == b"<html ":
        return "is a web page, perhaps an error page in place of a download. Fetch the file itself."
    return ""


def _no_parquet(start: bytes) -> str:
    if start.startswith((_PARQUET, b"PARE")):
        return ""
    text = start.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if text.startswith(b"{"):
        return "is no parquet file; it looks like JSON lines. Set kind=jsonl."
    return "is no parquet file (parquet begins with PAR1). Set kind to what it is, or fetch it again."


def json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every line of a JSON lines file that is not blank.

    Raises:
        ValueError: naming file and line, for a line that is not UTF-8, not JSON, no object, or has a column twice.
    """
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if number == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if not raw.strip():
                continue
            place = f"{path}:{number}"
            yield place, _row(raw, place)


def _row(raw: bytes, place: str) -> dict[str, Any]:
    try:
        row = _DECODER.decode(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is no UTF-8: byte 0x{raw[error.start]:02x} at byte {error.start + 1} of the line. Save the file "
            "as UTF-8; `iconv -f ISO-8859-1 -t UTF-8` turns Latin-1 into that"
        ) from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not valid JSON: {error.msg} at column {error.colno}{_json_hint(raw)}") from error
    except _RepeatedNameError as error:
        raise ValueError(f"{place} has {error} twice in one object; which one counts cannot be told") from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deeply to be read") from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise ValueError(
            f"{place} holds a number that cannot be read ({error}). Write it as text, in quotes"
        ) from error
    if not isinstance(row, dict):
        raise ValueError(
            f"{place} holds a JSON {type(row).__name__}; every line is an object with columns{_json_hint(raw)}"
        )
    return row


class _RepeatedNameError(Exception):
    """A name stands twice in a JSON object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedNameError(repr(next(name for name in names if names.count(name) > 1)))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _json_hint(raw: bytes) -> str:
    """The remedy for files that are JSON or tables, but of another shape."""
    start = raw.lstrip()[:1]
    if start == b"[":
        return ". A file that is one list becomes lines by `jq -c '.[]'`"
    if start == b"{":
        return ". An object stands on one line; `jq -c .` writes it so"
    if b"," in raw or b"\t" in raw:
        return ". If this is a table (CSV), write its rows as JSON lines or parquet"
    return ""


def open_parquet(path: Path) -> parquet.ParquetFile:
    """A parquet file.

    Raises:
        ValueError: naming the file, if its metadata cannot be read.
    """
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(_damaged(path, error)) from error


def parquet_batches(
    file: parquet.ParquetFile, path: Path, columns: Sequence[str] | None, size: int
) -> Iterator[pa.RecordBatch]:
    """Some columns of a parquet file (None: all), a batch of rows at a time, in types that pyarrow can take rows of.

    Raises:
        ValueError: naming the file, if it is damaged, or holds types that cannot be read.
    """
    batches = file.iter_batches(size, columns=None if columns is None else list(columns))
    while True:
        try:
            batch = next(batches, None)
            if batch is None:
                return
            fields = [pa.field(field.name, _plain(field.type)) for field in batch.schema]
            batch = batch if list(batch.schema) == fields else batch.cast(pa.schema(fields))
        except (pa.ArrowException, OSError) as error:
            raise ValueError(_damaged(path, error)) from error
        yield batch


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without views and dictionaries, which pyarrow cannot always take rows of."""
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_binary_view(kind):
        return pa.large_binary()
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _plain(field.type)) for field in kind])
    if pa.types.is_large_list(kind):
        return pa.large_list(_plain(kind.value_type))
    if pa.types.is_list(kind):
        return pa.list_(_plain(kind.value_type))
    return kind


def _damaged(path: Path, error: BaseException) -> str:
    reason = " ".join(str(error).split())
    if isinstance(error, pa.ArrowNotImplementedError):
        return f"prompt file {path} holds a type that cannot be read ({reason:.300}). Write its columns as plain text"
    return f"prompt file {path} cannot be read as parquet: it is damaged or cut off ({reason:.300}). Fetch it again"
