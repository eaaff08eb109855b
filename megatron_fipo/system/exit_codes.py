"""The exit codes of every command, which job scripts and other programs may rely on; `error_net` chooses among them."""

from __future__ import annotations

EXIT_FAULT = 1
"""A fault of this program, or the answer "no" of a command that checks something."""
EXIT_BAD_INPUT = 2
"""Something that the command was given cannot be used."""
EXIT_STOPPED = 3
"""The command stopped early (a signal, a full disk, a dead machine), and what was saved is whole: the same command goes
on from there."""
EXIT_KILLED = 128
"""Added to the number of the signal that ended a process, as shells report it."""
