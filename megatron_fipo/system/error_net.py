"""How a command ends when something went wrong: with a message, and an exit code that says who has to act.

0: done. 2: something that it was given cannot be used. 3: it stopped, and what was saved is whole: a signal, a full
disk, a dead machine; the same command continues. 1: a fault of this program, with the traceback that finding it takes.
`preflight`, `certify` and `conformance` also end with 1 when their answer is no.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable

from megatron_fipo import __version__
from megatron_fipo.config import without_secrets
from megatron_fipo.system.disk import DiskError
from megatron_fipo.system.exit_codes import EXIT_BAD_INPUT, EXIT_FAULT, EXIT_STOPPED
from megatron_fipo.system.text_hygiene import clean_text

_OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
    *(errno.EAGAIN, errno.EFBIG, errno.ENOTCONN, errno.ETIMEDOUT, errno.ECONNRESET, errno.EPIPE, errno.ENODEV),
}
"""Errors of the operating system that no other input would mend."""

_OTHER_RANK_LEFT = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused) by peer|Broken pipe|TCPStore", re.IGNORECASE
)


def report(error: Exception, say: Callable[[str], None], prefix: str = "error") -> int:
    """Print an error that ended a command. Returns the command's exit code.

    Args:
        say: writes the words where the user sees them.
        prefix: stands in front of them.
    """
    words, code = _words(error)
    if code == EXIT_FAULT:
        lines = "".join(traceback.format_exception(error))
        say(f"{lines}{prefix}: {words}")
    else:
        say(f"{prefix}: {words}")
    return code


def is_of_the_machine(error: OSError) -> bool:
    """Whether no other input would mend it: a full disk, no memory, a file system that is gone."""
    return error.errno in _OF_THE_MACHINE


def for_people(text: str) -> str:
    """A message without secrets and without anything that moves the terminal's cursor or colours it."""
    return clean_text(without_secrets(text))


def say_on_stderr(text: str) -> None:
    """Print a message."""
    print(for_people(text), file=sys.stderr, flush=True)


def _words(error: Exception) -> tuple[str, int]:
    """(what to say, exit code)."""
    if isinstance(error, UnicodeError):
        return f"{error} (in {_place(error)}): a text that is no UTF-8", EXIT_BAD_INPUT
    if isinstance(error, DiskError):
        return str(error), EXIT_STOPPED
    if isinstance(error, ValueError):
        return str(error) or f"{type(error).__name__} in {_place(error)}", EXIT_BAD_INPUT
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported
        return (
            f"out of memory: {str(error) or 'this process got no more'}. Lower batch.max_tokens_per_microbatch or "
            "rollout.max_batch_size, or shard further (parallel.*); megatron-fipo preflight names the largest part.",
            EXIT_STOPPED,
        )
    if isinstance(error, OSError):
        what = f": {error.filename}" if error.filename is not None else ""
        if is_of_the_machine(error):
            return (
                f"{error.strerror}{what} (in {_place(error)}). Make room or mend the machine; the same command goes on "
                "from what was saved.",
                EXIT_STOPPED,
            )
        return f"{error.strerror or error}{what} (in {_place(error)})", EXIT_BAD_INPUT
    if _is_of_another_rank(error):
        reason = " ".join(str(error).split())
        return (
            "another process of the run has ended while this one waited for it; its own words, or the signal that "
            f"ended it, say why ({reason:.200})",
            EXIT_STOPPED,
        )
    return (
        f"{type(error).__name__} in {_place(error)}. This is a fault of megatron_fipo {__version__}, not of its "
        "input. Please report it to the project, with the lines above and the run's config.yaml.",
        EXIT_FAULT,
    )


def _is_of_another_rank(error: Exception) -> bool:
    """Whether a collective failed because the other side is gone."""
    is_of_torch = type(error).__module__.startswith("torch") and type(error).__name__.startswith("Dist")
    is_plain = type(error) is RuntimeError  # gloo's, for most operations
    return (is_of_torch or is_plain) and _OTHER_RANK_LEFT.search(str(error)) is not None


def _place(error: BaseException) -> str:
    """Where an error was raised in this package, as module and line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "megatron_fipo" in frame.filename] or frames
    if not own:
        return "an unknown place"
    file = own[-1].filename
    return f"{file[file.rfind('megatron_fipo') :] if 'megatron_fipo' in file else file}:{own[-1].lineno}"
