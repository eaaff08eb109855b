"""Keeps Python's collector away from a program's imports. Imported first; `begin_to_collect` comes after the last one.

Four thousand modules are imported before a rank does anything. None of that is garbage, but the collector looks through
all of it again and again as it grows, and once more when the process ends: a third of the time that a start takes.
"""

from __future__ import annotations

import gc

_was_enabled = gc.isenabled()
gc.disable()


def begin_to_collect() -> None:
    """Have the collector look at what is made from now on, and never at what is there already."""
    gc.freeze()
    if _was_enabled:
        gc.enable()
