"""Imports transformers, which then looks through its models' files once.

It finds out what each of its five hundred folders of models holds by reading them when it is imported, and once more
when the first model is. It means to remember what it read, but in a cache of 128 entries, in which none of them is left
when it is asked for again: a quarter of a second of every start. Here that one cache keeps all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_SCAN = "create_import_structure_from_path"
_lru_cache = functools.lru_cache


def _all_of_a_scan(maxsize: Any = 128, typed: bool = False) -> Callable[..., Any]:
    """`functools.lru_cache`, without a limit for the one function."""
    if getattr(maxsize, "__name__", None) == _SCAN:  # it is decorated without parentheses
        return functools.cache(maxsize)
    return _lru_cache(maxsize, typed)


functools.lru_cache = _all_of_a_scan  # type: ignore[assignment]
try:
    import transformers  # noqa: F401
finally:
    functools.lru_cache = _lru_cache
