"""Numbers and names computed from values by a hash: the same on every machine, in every Python and on every rank."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(values: Any) -> str:
    """32 hexadecimal digits, equal for values that have the same JSON text, whatever the order of their keys.

    What JSON does not know, such as a path, counts as its text.
    """
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def hashed_seed(*parts: int) -> int:
    """A seed in 0 … 2**63 - 1 that depends on every one of the numbers and on their order."""
    key = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
