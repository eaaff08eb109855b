"""Keeps Python's collector away from a program's imports.

Four thousand modules are imported before a rank does anything. None of that is garbage, but the collector looks through
all of it again and again as it grows, at every checkpoint (Megatron asks for it), and once more when the process ends:
a third of the time that a start takes. In a process that is somebody else's, such as a notebook's, nothing changes:
what is garbage there already would stay for good.

A rank's program imports this first, and calls `begin_to_collect` after its last import. The command line does not know
what will be imported until it has read a command: there the imports are made in `imports()`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_RANK, _COMMAND_LINE, _SCRIPT = "megatron_fipo.train", "megatron_fipo.cli", "megatron-fipo"
"""What this process may have been started as: a module by `python -m`, or the script that pip installs."""


def _program() -> str:
    """The module or the file that this process was started to run."""
    main = sys.modules["__main__"]
    specification = getattr(main, "__spec__", None)
    return specification.name if specification else Path(getattr(main, "__file__", None) or "").name


def begin_to_collect() -> None:
    """Have the collector look at what is made from now on, and never at what is there already."""
    if _IS_OFF:
        gc.freeze()
        gc.enable()


@contextmanager
def imports() -> Iterator[None]:
    """No collection in this block, nor later of what is there at its end."""
    if not (_program() in (_COMMAND_LINE, _SCRIPT) and gc.isenabled()):
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


_IS_OFF = _program() == _RANK and gc.isenabled()
if _IS_OFF:
    gc.disable()
