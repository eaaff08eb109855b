"""What Weights & Biases has recorded of an offline run, read from its file.

The file is a log of records as LevelDB writes it: a header of 7 bytes, then blocks of 32 KiB of chunks. A chunk has a
checksum, its length, and whether it is a whole record or the first, a middle or the last part of one.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _CHUNK = 32 * 1024, 7, 7
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def _records(content: bytes) -> Iterator[bytes]:
    place, record = _HEADER, b""
    while place + _CHUNK <= len(content):
        if _BLOCK - place % _BLOCK < _CHUNK:  # no chunk begins so late in a block
            place += _BLOCK - place % _BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        place += _CHUNK
        part, place = content[place : place + length], place + length
        assert kind in (_WHOLE, _FIRST, _MIDDLE, _LAST)
        record = part if kind in (_WHOLE, _FIRST) else record + part
        if kind in (_WHOLE, _LAST):
            yield record


def logged(path: Path) -> list[dict[str, Any]]:
    """What each call of `log` has recorded, by name, nested names joined by a bar; without what the package adds."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        if record.WhichOneof("record_type") == "history":
            items = {"|".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            found.append({name: value for name, value in items.items() if not name.startswith("_")})
    return found
