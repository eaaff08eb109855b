"""Keeps Python's collector away from a program's imports. Imported first; `begin_to_collect` comes after the last one.

Four thousand modules are imported before a rank does anything. None of that is garbage, but the collector looks through
all of it again and again as it grows, at every checkpoint (Megatron asks for it), and once more when the process ends:
a third of the time that a start takes. In a process that is somebody else's, such as a notebook's, nothing changes:
what is garbage there already would stay for good.
"""

from __future__ import annotations

import gc
import sys


def _is_ours() -> bool:
    """Whether this process was started to train: python -m megatron_fipo.train."""
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return specification is not None and specification.name == "megatron_fipo.train"


_OURS = _is_ours() and gc.isenabled()
if _OURS:
    gc.disable()


def begin_to_collect() -> None:
    """Have the collector look at what is made from now on, and never at what is there already."""
    if _OURS:
        gc.freeze()
        gc.enable()
