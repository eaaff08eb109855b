"""Messages from a worker to the pool: frames of JSON, bounded in size, of which every field is checked.

A frame is its length in four bytes, the most significant first, and so many bytes of JSON. Nothing that comes from a
worker is unpickled: a worker judges what a model wrote, and the pool runs in the trainer. (Jobs travel the other way,
pickled: the trainer may be believed.)
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

from megatron_fipo.system.text_hygiene import clean_text
from megatron_fipo.verifiers.verdict import NO_VERDICT, RAISED, Verdict

MAX_FRAME_BYTES = 2**21
"""Longest frame; one that says it is longer is refused before it is read."""

MAX_ANSWER_CHARACTERS = 100_000
"""Longest answer that a verdict carries; programs, the longest of them, have half of it."""

MAX_ERROR_CHARACTERS = 2_000
"""Longest reason for an error that a verdict carries."""

MAX_PARTS = 64
"""Most numbers beside its score that a verdict carries."""

MAX_PART_CHARACTERS = 200
"""Longest name of such a number."""

_HEADER = struct.Struct(">I")
_READ_BYTES = 65536


class MalformedMessageError(ValueError):
    """A message of another kind than was expected, or none at all."""


def pack_frame(message: Mapping[str, Any]) -> bytes:
    """One frame."""
    body = json.dumps(message).encode("ascii")
    return _HEADER.pack(len(body)) + body


def write_all(fd: int, content: bytes) -> None:
    """Write everything; the system may take less at a time."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


class FrameReader:
    """Takes frames from a file descriptor, a piece at a time, so that a half frame holds nobody up."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._received = bytearray()

    def read_more(self) -> bool:
        """Read what is there, once; the descriptor is readable. False at the end of the stream."""
        piece = os.read(self._fd, _READ_BYTES)
        self._received += piece
        return bool(piece)

    def next_frame(self) -> dict[str, Any] | None:
        """The next object, or None if more has to be read first.

        Raises:
            MalformedMessageError: for a frame that is too long or holds anything else.
        """
        if len(self._received) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(self._received)
        if size > MAX_FRAME_BYTES:
            raise MalformedMessageError(f"a message of {size} bytes, and {MAX_FRAME_BYTES} are the most")
        end = _HEADER.size + size
        if len(self._received) < end:
            return None
        body = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        return read_object(body)


def read_object(body: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        MalformedMessageError: for anything else.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"what is no JSON: {body[:100]!r}") from error
    if not isinstance(message, dict):
        raise MalformedMessageError(f"what is no JSON object: {body[:100]!r}")
    return message


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """A verdict's fields as they travel, cut to what is carried."""
    return {
        "score": float(verdict.score),
        "answer": verdict.answer[: MAX_ANSWER_CHARACTERS + 1],
        "error": verdict.error[: MAX_ERROR_CHARACTERS + 1],
        "fault": verdict.fault,
        "parts": {str(name): float(value) for name, value in verdict.parts.items()},
    }


def read_verdict(message: Mapping[str, Any]) -> Verdict:
    """The verdict of a message, its texts cleaned.

    Raises:
        MalformedMessageError: unless every field is there and is what it has to be.
    """
    score, answer, error = (message.get(name) for name in ("score", "answer", "error"))
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise MalformedMessageError(f"a score that is no number in [0, 1]: {score!r:.100}")
    if not isinstance(answer, str) or not isinstance(error, str):
        raise MalformedMessageError("an answer or an error that is no text")
    fault = message.get("fault")
    if fault not in ("", RAISED, NO_VERDICT):
        raise MalformedMessageError(f"a kind of fault that there is not: {fault!r:.100}")
    return Verdict(
        float(score),
        clean_text(answer, MAX_ANSWER_CHARACTERS),
        error=clean_text(error, MAX_ERROR_CHARACTERS),
        parts=_parts(message.get("parts")),
        fault=fault,
    )


def _parts(parts: Any) -> dict[str, float]:
    """The numbers of which a verdict is made."""
    if not isinstance(parts, dict) or len(parts) > MAX_PARTS:
        raise MalformedMessageError(f"parts that are no object of at most {MAX_PARTS} numbers: {parts!r:.100}")
    for value in parts.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MalformedMessageError(f"a part that is no finite number: {value!r:.100}")
    return {clean_text(name, MAX_PART_CHARACTERS): float(value) for name, value in parts.items()}
