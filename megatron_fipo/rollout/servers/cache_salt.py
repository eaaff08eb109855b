"""The name under which servers keep keys and values for reuse: another one for every version of the weights.

An update empties the caches. This is a second safeguard, which also reaches caches that an update does not: keys and
values that outlived it would be looked for under another name.
"""

from __future__ import annotations

import secrets

_OF_THIS_PROCESS = secrets.token_hex(8)
"""A run that goes on after a kill counts its versions anew from a checkpoint, with other weights."""


def cache_salt(version: str) -> str:
    """The name for a version of the weights; the same for all servers of a process, which may share a router."""
    return f"{_OF_THIS_PROCESS}-{version}"
