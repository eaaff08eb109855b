"""The lines of the ledger's files: a checksum, and a JSON object that may be a response.

A line is the CRC-32 of what follows it, a space, and a JSON object. Token ids and log-probs are little-endian int32 and
float32 in base64, so nothing is rounded.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory, outline, segments_from


def line_of(record: dict[str, Any]) -> bytes:
    """The record as one line."""
    text = json.dumps(record).encode()  # ASCII: whatever a verifier answered can be written, lone surrogates too
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file, without a last line that was torn.

    Raises:
        ValueError: if a line is not what was written, naming it.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            checksum, _, text = line[:-1].partition(b" ")
            if checksum != b"%08x" % zlib.crc32(text):
                raise damaged(path, number, "its CRC-32 differs")
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise damaged(path, number, f"it is no JSON: {error}") from error
            if not isinstance(record, dict):
                raise damaged(path, number, f"it holds a {type(record).__name__}")
            yield record


def damaged(path: Path, number: int, reason: str) -> ValueError:
    """The error of a line that is not what was written there."""
    return ValueError(
        f"{path}, line {number} is not what was written there ({reason}). Restore the file from a copy, or delete the "
        f"folder {path.parent}: its responses are then generated anew."
    )


def cut_torn_line(path: Path) -> None:
    """Cut off what follows the last line's end."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)


def response_record(sample: Trajectory) -> dict[str, Any]:
    """A response and its verdict, without prompt and text."""
    return {
        **sample.key._asdict(),
        "response_ids": _encoded(sample.response_ids, "<i4"),
        "rollout_log_probs": _encoded(sample.rollout_log_probs, "<f4"),
        "finish_reason": sample.finish_reason,
        "segments": outline(sample.segments),
        "accuracy": sample.accuracy,
        "answer": sample.answer,
        "error": sample.error,
        **({"parts": sample.parts} if sample.parts else {}),
    }


def recorded_response(record: dict[str, Any], path: Path, number: int) -> Trajectory:
    """The response of a record, without prompt and text.

    Args:
        path, number: file and line that it was read from.

    Raises:
        ValueError: if the record holds none.
    """
    try:
        response_ids = _decoded(record["response_ids"], "<i4").long()
        return Trajectory(
            key=SampleKey(record["source"], record["prompt_id"], record["sample_index"]),
            prompt_ids=torch.empty(0, dtype=torch.int64),
            segments=segments_from(record, response_ids, _decoded(record["rollout_log_probs"], "<f4")),
            finish_reason=record["finish_reason"],
            accuracy=record["accuracy"],
            answer=record["answer"],
            error=record["error"],
            parts=record.get("parts", {}),
        )
    except (LookupError, TypeError, ValueError) as error:  # binascii's error is a ValueError
        raise damaged(path, number, f"it holds no judged response: {error!r}") from error


def with_prompt(sample: Trajectory, prompt: Prompt) -> Trajectory:
    """The response with its prompt's tokens, which no record holds."""
    sample.prompt_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
    return sample


def _encoded(values: Tensor, dtype: str) -> str:
    return base64.b64encode(values.cpu().numpy().astype(dtype).tobytes()).decode()


def _decoded(text: str, dtype: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=dtype).copy())
