"""Calls of the worker extension, sealed by the trainer: JSON text and a code over it that only the key's holders make.

The guard before the HTTP routes wants the key already. This one holds for the worker whichever way a call reaches it,
for a server too that was started without the guard; and the key itself is not among the arguments, which vLLM passes
on between processes and may log. Nothing protects against a repeated call: whoever can read a call on its way has
read the key in its header.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Sequence
from typing import Any


def seal(key: str, method: str, arguments: Sequence[Any]) -> list[str]:
    """The sealed form of a call of `method` with these arguments: [JSON text, code]."""
    text = json.dumps(list(arguments))
    return [text, _code(key, method, text)]


def unseal(key: str, method: str, sealed: Sequence[Any]) -> list[Any]:
    """The arguments of a call that has arrived.

    Raises:
        PermissionError: if it was not sealed with this key, for this method, or was changed since.
    """
    is_whole = len(sealed) == 2 and all(isinstance(part, str) for part in sealed)
    if not is_whole or not hmac.compare_digest(_code(key, method, sealed[0]).encode(), sealed[1].encode()):
        raise PermissionError(
            f"{method} was called without this server's key. A server that a run starts has the run's; for one of "
            "servers.urls, servers.api_key_env must name a variable with the text that the server got as "
            "MEGATRON_FIPO_SERVER_KEY."
        )
    return list(json.loads(sealed[0]))


def _code(key: str, method: str, text: str) -> str:
    return hmac.new(key.encode(), f"{method}\n{text}".encode(), hashlib.sha256).hexdigest()
