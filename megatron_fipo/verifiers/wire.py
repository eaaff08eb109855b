"""Messages from a worker to the pool: JSON frames of limited size, with every field checked.

A frame is the length of its JSON in four bytes, big-endian, and the JSON. Data from a worker is never unpickled, since
a worker judges what a model wrote and the pool runs in the trainer. Jobs to a worker are pickled, since the trainer is
trusted.
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
"""Longest frame; one with a larger length is refused before it is read."""

MAX_ANSWER_CHARACTERS = 100_000
"""Longest answer of a verdict. Programs, the longest answers, have up to half of it."""

MAX_ERROR_CHARACTERS = 2_000
"""Longest error of a verdict."""

MAX_PARTS = 64
"""Largest number of a verdict's parts."""

MAX_PART_CHARACTERS = 200
"""Longest name of a part; longer names are cut."""

_HEADER = struct.Struct(">I")
_READ_BYTES = 65536


class MalformedMessageError(ValueError):
    """A message that does not have the expected form."""


def pack_frame(message: Mapping[str, Any]) -> bytes:
    """Encode a message as one frame."""
    body = json.dumps(message).encode("ascii")
    return _HEADER.pack(len(body)) + body


def write_all(fd: int, content: bytes) -> None:
    """Write all of `content`; one os.write may take only a part."""
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


class FrameReader:
    """Reads frames from a file descriptor in pieces, without blocking on an incomplete frame."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._received = bytearray()

    def read_more(self) -> bool:
        """Read once, when the descriptor is readable; returns False at the end of the stream."""
        piece = os.read(self._fd, _READ_BYTES)
        self._received += piece
        return bool(piece)

    def next_frame(self) -> dict[str, Any] | None:
        """Return the next frame's JSON object, or None if more must be read first.

        Raises:
            MalformedMessageError: if the frame is too long or does not hold a JSON object.
        """
        if len(self._received) < _HEADER.size:
            return None
        (size,) = _HEADER.unpack_from(self._received)
        if size > MAX_FRAME_BYTES:
            raise MalformedMessageError(f"a message of {size} bytes, above the limit of {MAX_FRAME_BYTES}")
        end = _HEADER.size + size
        if len(self._received) < end:
            return None
        body = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        return read_object(body)


def read_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        MalformedMessageError: for anything else.
    """
    try:
        message = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"data that is not JSON: {body[:100]!r}") from error
    if not isinstance(message, dict):
        raise MalformedMessageError(f"data that is not a JSON object: {body[:100]!r}")
    return message


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """A verdict's fields for a message; texts are cut to one character more than `read_verdict` keeps."""
    return {
        "score": float(verdict.score),
        "answer": verdict.answer[: MAX_ANSWER_CHARACTERS + 1],
        "error": verdict.error[: MAX_ERROR_CHARACTERS + 1],
        "fault": verdict.fault,
        "parts": {str(name): float(value) for name, value in verdict.parts.items()},
    }


def read_verdict(message: Mapping[str, Any]) -> Verdict:
    """Read the verdict from a message; its texts are cleaned and cut.

    Raises:
        MalformedMessageError: if a field is missing or has a value that it may not have.
    """
    score, answer, error = (message.get(name) for name in ("score", "answer", "error"))
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
        raise MalformedMessageError(f"a score that is not a number in [0, 1]: {score!r:.100}")
    if not isinstance(answer, str) or not isinstance(error, str):
        raise MalformedMessageError("an answer or an error that is not a text")
    fault = message.get("fault")
    if fault not in ("", RAISED, NO_VERDICT):
        raise MalformedMessageError(f"an unknown kind of fault: {fault!r:.100}")
    return Verdict(
        float(score),
        clean_text(answer, MAX_ANSWER_CHARACTERS),
        error=clean_text(error, MAX_ERROR_CHARACTERS),
        parts=_parts(message.get("parts")),
        fault=fault,
    )


def _parts(parts: Any) -> dict[str, float]:
    """Check a verdict's parts."""
    if not isinstance(parts, dict) or len(parts) > MAX_PARTS:
        raise MalformedMessageError(f"parts that are not an object of at most {MAX_PARTS} numbers: {parts!r:.100}")
    for value in parts.values():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise MalformedMessageError(f"a part that is not a finite number: {value!r:.100}")
    return {clean_text(name, MAX_PART_CHARACTERS): float(value) for name, value in parts.items()}
