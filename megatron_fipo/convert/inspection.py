"""Finds everything that is wrong with a Hugging Face folder: nothing that is converted is taken on trust."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from megatron_fipo.config import ConfigError
from megatron_fipo.config.text_files import read_json_object
from megatron_fipo.convert.dtypes import FLOATS, SAFETENSORS_DTYPES, dtype_name, stated_dtype
from megatron_fipo.convert.families import FAMILIES, expected_tensors
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.hf_folder import EMBEDDING, OUTPUT, CheckpointReader
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.convert.problems import NotFiniteError, Problem, not_finite, placed
from megatron_fipo.convert.weight_files import INDEX_FILE, WeightFiles, find_weight_files, is_buffer, tied_difference


@dataclass(frozen=True)
class Entry:
    """One tensor, as the header of its safetensors file describes it.

    Attributes:
        file: the file that holds it.
        dtype: safetensors' name of its dtype.
        shape: its size in every dimension.
        is_whole: whether the file is long enough to hold all of it.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    is_whole: bool


def inspect_folder(folder: str | Path) -> tuple[ModelShape, list[Problem]]:
    """Check config, tokenizer and the headers of the weight files, without reading weights.

    A tied output layer that is stored all the same is the exception: it is read, with the embedding, and compared.

    Raises:
        ValueError: if config.json cannot be read or describes a model that is not supported, or if the folder does not
            tell which of its files hold the weights.
    """
    root = Path(folder)
    shape = read_model_shape(root)
    weights = files_of_weights(root)
    owners = weights.owner_of or {}
    entries, problems = _read_headers(weights)
    damaged = {file.name for file in weights.files if file.is_file()} - {entry.file.name for entry in entries.values()}
    problems += [*_check_index(shape, owners, entries), *_check_names(shape, owners, entries, damaged)]
    problems += [*_check_shapes(shape, entries), *_check_dtypes(root, entries), *_check_tokenizer(root, shape)]
    if shape.tied_embeddings and not problems:
        problems += _check_tied_output(entries)
    return shape, placed(problems, root)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds any weight file."""
    return any(folder.glob("*.safetensors"))


def files_of_weights(folder: str | Path) -> WeightFiles:
    """Call `find_weight_files`; for a folder without weights, such as one with a config.json alone, give no files."""
    return find_weight_files(folder) if has_weights(Path(folder)) else WeightFiles((), None, ())


def check_weights(folder: str | Path) -> str:
    """Open a folder as training does, and look at every number in it.

    Returns:
        A warning about files that are not read, or an empty text.

    Raises:
        ValueError: if it does not hold one whole model of finite numbers, saying what is wrong.
    """
    shape = read_model_shape(folder)
    reader = CheckpointReader(folder, shape)
    names = expected_tensors(shape)
    if problems := [problem for name in names for problem in not_finite(name, reader.place(name), reader.read(name))]:
        raise NotFiniteError(Path(folder), problems)
    return reader.files.warning()


def _read_headers(weights: WeightFiles) -> tuple[dict[str, Entry], list[Problem]]:
    entries: dict[str, Entry] = {}
    problems: list[Problem] = []
    for file in (file for file in weights.files if file.is_file()):
        try:
            header, data_bytes = _header(file)
        except (struct.error, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError among them
            problems.append(Problem("unreadable", "every tensor", file.name, f"its header is damaged: {error}"))
            continue
        for name, (dtype, shape, begin, end) in header.items():
            if is_buffer(name):
                continue
            whole = Entry(file, dtype, shape, end <= data_bytes)
            if not whole.is_whole:
                detail = f"{max(data_bytes - begin, 0)} of its {end - begin} bytes are there"
                problems.append(Problem("truncated", name, file.name, detail))
            if name in entries:
                detail = f"it is in {entries[name].file.name} too"
                problems.append(Problem("extra", name, file.name, detail))
            entries[name] = whole
    return entries, problems


def _header(file: Path) -> tuple[dict[str, tuple[str, tuple[int, ...], int, int]], int]:
    """({tensor: (dtype, shape, begin, end)} by a safetensors file's header, bytes of data after it).

    Raises:
        ValueError, struct.error, RecursionError: if it is damaged.
    """
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        size = file.stat().st_size - 8
        if length > size:
            raise struct.error(f"it should have {length} bytes and the file has {size} more")
        raw = json.loads(stream.read(length))
    if not isinstance(raw, dict):
        raise ValueError(f"it holds a {type(raw).__name__}")
    return {name: _header_entry(name, entry) for name, entry in raw.items() if name != "__metadata__"}, size - length


def _header_entry(name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its entry for {name} is malformed ({error!r})") from error
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"its entry for {name} is malformed")
    return dtype, shape, begin, end


def _check_index(shape: ModelShape, owners: dict[str, str], entries: dict[str, Entry]) -> Iterator[Problem]:
    """Contradictions between index and files: transformers and the engines load by the index alone."""
    expected = expected_tensors(shape)
    for name, entry in entries.items() if owners else ():
        if name not in owners and name in expected:
            yield Problem("missing", name, INDEX_FILE, f"{entry.file.name} has it")
        elif entry.file.name != owners.get(name, entry.file.name):
            yield Problem("missing", name, owners[name], f"{INDEX_FILE} says so, but it is in {entry.file.name}")


def _check_names(
    shape: ModelShape, owners: dict[str, str], entries: dict[str, Entry], damaged: set[str]
) -> Iterator[Problem]:
    expected = expected_tensors(shape)
    for name in (name for name in expected if name not in entries):
        if owners.get(name) not in damaged and (owners or not damaged):  # the file's damage is reported already
            where = owners.get(name, "*.safetensors")
            yield Problem("missing", name, where, "config.json implies it")
    patterns = [
        re.compile(re.sub(r"\\\{(layer|expert)\\\}", r"\\d+", re.escape(tensor.name)))
        for row in FAMILIES[shape.family].table
        for tensor in row.tensors
    ]
    allowed = {OUTPUT} if shape.tied_embeddings else set()
    for name in sorted(entries.keys() - expected.keys() - allowed):
        if any(pattern.fullmatch(name) for pattern in patterns):
            yield Problem("extra", name, entries[name].file.name, "config.json describes a model without it")
        else:
            yield Problem("unmapped", name, entries[name].file.name, f"the {shape.family} table has no row for it")


def _check_shapes(shape: ModelShape, entries: dict[str, Entry]) -> Iterator[Problem]:
    for name, size in expected_tensors(shape).items():
        found = entries.get(name)
        if found is None or found.shape == size:
            continue
        if name in (EMBEDDING, OUTPUT) and found.shape[1:] == size[1:]:
            detail = f"it has {found.shape[0]} rows; config.json says vocab_size={size[0]}"
            yield Problem("vocabulary", name, found.file.name, detail)
        else:
            yield Problem(
                "shape", name, found.file.name, f"it is {list(found.shape)}; config.json implies {list(size)}"
            )


def _check_dtypes(root: Path, entries: dict[str, Entry]) -> Iterator[Problem]:
    stated = stated_dtype(root)
    origin = "config.json says"
    if stated is None and entries:
        first = next(iter(entries))
        stated, origin = SAFETENSORS_DTYPES.get(entries[first].dtype), f"{first} is"
    for name, entry in entries.items():
        dtype = SAFETENSORS_DTYPES.get(entry.dtype)
        if dtype not in FLOATS:
            detail = f"it is {entry.dtype}; supported are float32, float16 and bfloat16, not quantized weights"
            yield Problem("dtype", name, entry.file.name, detail)
        elif dtype != stated:
            detail = f"it is {dtype_name(dtype)}; {origin} {dtype_name(stated)}. Whichever is wrong, correct it"
            yield Problem("dtype", name, entry.file.name, detail)


def _check_tied_output(entries: dict[str, Entry]) -> Iterator[Problem]:
    """A model whose output layer is its embedding may carry the output layer too, if it is the same."""
    if OUTPUT not in entries:
        return
    with safe_open(entries[EMBEDDING].file, framework="pt") as handle:
        embedding = handle.get_tensor(EMBEDDING)
    with safe_open(entries[OUTPUT].file, framework="pt") as handle:
        detail = tied_difference(embedding, handle.get_tensor(OUTPUT))
    if detail:
        words = f"config.json ties it to the embedding (tie_word_embeddings): {detail}"
        yield Problem("different", OUTPUT, entries[OUTPUT].file.name, words)


def _check_tokenizer(root: Path, shape: ModelShape) -> Iterator[Problem]:
    """Every token must have a row in the embedding. More rows than tokens are usual."""
    if not (root / "tokenizer.json").is_file():
        return
    try:
        numbers = _token_numbers(read_json_object(root / "tokenizer.json"))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        words = str(error) if isinstance(error, ConfigError) else f"it is malformed ({error!r})"
        yield Problem("unreadable", "no tensor", "tokenizer.json", words)
        return
    if not numbers:
        yield Problem("unreadable", "no tensor", "tokenizer.json", "it holds no token")
    beyond = {token: number for token, number in numbers.items() if number >= shape.vocab_size}
    if beyond:
        token, largest = max(beyond.items(), key=lambda item: item[1])
        detail = f"token {token!r} has the number {largest}; config.json says vocab_size={shape.vocab_size}"
        yield Problem("vocabulary", EMBEDDING, "tokenizer.json", detail)
    yield from _check_special_tokens(root, shape)


def _token_numbers(raw: dict[str, Any]) -> dict[str, int]:
    """Token -> number, of a tokenizer.json."""
    vocabulary = raw.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # (token, score) by number, in unigram models
        vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
    numbers = {**vocabulary, **{token["content"]: token["id"] for token in raw.get("added_tokens") or []}}
    if not all(type(number) is int for number in numbers.values()):
        raise TypeError("a token's number is no whole number")
    return numbers


def _check_special_tokens(root: Path, shape: ModelShape) -> Iterator[Problem]:
    for file in ("config.json", "generation_config.json"):
        raw = read_json_object(root / file) if (root / file).is_file() else {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = raw.get(key)
            numbers: Iterable[Any] = value if isinstance(value, list) else [value]
            if any(isinstance(number, int) and number >= shape.vocab_size for number in numbers):
                detail = f"{key}={value}; config.json says vocab_size={shape.vocab_size}"
                yield Problem("vocabulary", EMBEDDING, file, detail)
