"""Reads text files; errors name the file, the line and what to do."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any

from megatron_fipo.config.errors import ConfigError

LARGEST_BYTES = 64 * 2**20
"""Size of the largest file that is read, far beyond what a configuration needs; /dev/zero has no end."""
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode_text(content: bytes, place: str) -> str:
    """UTF-8 text, with or without a byte-order mark.

    Args:
        content: the file's bytes.
        place: the file's name for messages, with what it is: "configuration file run.yaml".

    Raises:
        ConfigError: for any other encoding, with the line.
    """
    if content.startswith(_UTF16_MARKS):
        raise ConfigError(f"{place} is encoded in UTF-16; text files are UTF-8 here. {_reencode('UTF-16')}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}, {encoding_problem(content, error)}") from error


def encoding_problem(content: bytes, error: UnicodeDecodeError, first_line: int = 1) -> str:
    """Line, byte and remedy of a text that is not UTF-8, to follow a file's name.

    Args:
        content: what was to be decoded, from the beginning of line `first_line` of the file on.
    """
    line = first_line + content.count(b"\n", 0, error.start)
    return (
        f"line {line}: byte 0x{content[error.start]:02x} is no UTF-8. Save the file as UTF-8. "
        f"{_reencode('ISO-8859-1')} if it is Latin-1"
    )


def _reencode(encoding: str) -> str:
    return f"`iconv -f {encoding} -t UTF-8` turns it into that"


def read_text(path: str | Path, what: str) -> str:
    """The text of a file.

    Args:
        path: the file.
        what: the kind of file, for messages: "configuration file".

    Raises:
        ConfigError: if it cannot be read or is no UTF-8.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(LARGEST_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{what} {path} cannot be read: {reason}.") from error
    if len(content) > LARGEST_BYTES:
        raise ConfigError(f"{what} {path} is larger than {LARGEST_BYTES // 2**20} MiB; it is some other file.")
    return decode_text(content, f"{what} {path}")


def parse_json(text: str, place: str) -> Any:
    """The value of a JSON text.

    Raises:
        ConfigError: naming the place, and what is wrong where.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise ConfigError(f"{place} is nested too deeply to be read.") from error
    except ValueError as error:  # a whole number of more digits than Python reads
        raise ConfigError(f"{place} cannot be read: {error}.") from error


def read_json_object(path: Path, place: str = "", expected: str = "") -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        path: the file.
        place: names the file in messages; its path if nothing is given.
        expected: a sentence for the message where the file cannot be read: what should be there.

    Raises:
        ConfigError: if the file cannot be read, is no UTF-8, is not valid JSON or holds something else.
    """
    place = place or str(path)
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{place} cannot be read: {reason}.{' ' if expected else ''}{expected}") from error
    text = decode_text(content, place)
    try:
        value = parse_json(text, place)
    except ConfigError as error:
        raise ConfigError(f"{error} Copy or download it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{place} holds a {type(value).__name__}; an object was expected. Copy or download it again.")
    return value
