"""Error messages for a checkpoint that cannot be written or read: a full disk is told from a rank that died."""

from __future__ import annotations

import re
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.checkpoint import CheckpointException

from megatron_fipo.system.disk import free_space


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


_LOST = re.compile(
    r"connection (closed|reset|refused)|peer|broken pipe|socket|timed? ?out|abort(ed)?|nccl|gloo|heartbeat|EOFError",
    re.I,
)
"""Words of torch's process groups by which another rank is gone."""
# Of a full disk, torch's zip writer says no more than a place in its source: "enforce fail at inline_container.cc:672".
_DISK = re.compile(
    r"OSError|No space|Disk quota|File too large|PytorchStreamWriter|inline_container|failed writing", re.I
)


def could_not_write(target: Path, error: BaseException) -> CheckpointError:
    """The error to raise: it says whether the disk is full, another rank has died, or neither, and what to do."""
    reason = str(error) or type(error).__name__
    if isinstance(error, CheckpointException):  # only the coordinator has the reasons; it prints a traceback of each
        reason = _reasons(error) or "a rank failed to write"
    untouched = "Earlier checkpoints and the rollouts since then are untouched."
    is_disk = not isinstance(error, ConnectionError) and (isinstance(error, OSError) or _DISK.search(reason))
    if not is_disk and (isinstance(error, (ConnectionError, EOFError, DistError)) or _LOST.search(reason)):
        return CheckpointError(
            f"the checkpoint {target} could not be written: another rank or its writer died or fell silent meanwhile "
            f"({' '.join(reason.split())[:300]}). {untouched} See what the first rank that failed says, or whether the "
            "system ended it (out of memory), and start the same command again: it goes on from them."
        )
    if not is_disk and not isinstance(error, CheckpointException):
        return CheckpointError(
            f"the checkpoint {target} could not be written: {' '.join(reason.split())}. {untouched} Start the same "
            "command again: it goes on from them."
        )
    return CheckpointError(
        f"the checkpoint {target} could not be written: {reason}{free_space(target.parent)}. {untouched} Make room or "
        "mend the folder's permissions, and start the same command again: it goes on from them."
    )


def could_not_read(checkpoint: Path, error: BaseException) -> ValueError:
    """The error to raise for a checkpoint whose files do not hold what its description says."""
    reason = _reasons(error) if isinstance(error, CheckpointException) else str(error)
    return ValueError(
        f"{checkpoint} cannot be read, although no file has changed since it was described: "
        f"{' '.join(reason.split())[:600] or 'a rank failed to read'}. Restore it from a copy, or delete it to go on "
        "from the one before."
    )


def _reasons(error: CheckpointException) -> str:
    """The reasons of all ranks that failed, each of them once."""
    return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
