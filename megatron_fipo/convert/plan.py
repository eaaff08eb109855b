"""Plans what a conversion writes, and keeps the folder that it writes into until it is whole."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_fipo import __version__
from megatron_fipo.convert.hf_writer import partial_of
from megatron_fipo.system.disk import put_folder_in_place, write_whole

PROCESS_BYTES = 400 * 1000**2
"""Memory of a process that has imported torch and converts nothing."""

_IDENTITY, _LOCK = "conversion.json", "conversion.lock"


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """A conversion, before anything is written.

    Attributes:
        source: the folder that is converted.
        target: the folder that is written.
        tensors: those of the target, under the names that they will have there.
        files: (name, bytes of tensors) of each weight file of the target.
        peak_bytes: an estimate of the process's memory at its highest.
    """

    source: Path
    target: Path
    tensors: tuple[PlannedTensor, ...]
    files: tuple[tuple[str, int], ...]
    peak_bytes: int

    @property
    def num_bytes(self) -> int:
        """Size of all tensors together."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse a target whose writing would destroy something.

    Raises:
        ValueError: if it is the source, lies in it, or exists with something in it and may not be replaced.
    """
    inside = source.resolve() in (target.resolve(), *target.resolve().parents)
    if inside or target.resolve() in source.resolve().parents:
        raise ValueError(f"{target} and {source}: the target must not lie inside the source, nor contain it.")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file. Name a folder that is to be made.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise ValueError(f"{target} exists. Choose another folder, delete it, or replace it with --overwrite.")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ValueError(
            f"{target} holds no model (no config.json), so --overwrite leaves it alone. Delete it yourself."
        )


@contextmanager
def being_written(plan: Plan) -> Iterator[Path]:
    """The folder to write into, which becomes the target when the block ends without an error.

    After an error or a kill the folder stays. The same conversion of the same files continues with what is in it;
    another conversion to the same target starts over.

    Raises:
        ValueError: if another process is writing the folder, or no conversion left it.
        OSError: if the folder cannot be made, or the disk has no room for the result.
    """
    partial = partial_of(plan.target)
    noted = partial / _IDENTITY
    if partial.exists() and not noted.is_file() and any(path.name != _LOCK for path in partial.iterdir()):
        raise ValueError(f"{partial} is no unfinished conversion to resume. Delete it, or choose another folder.")
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another conversion is writing {partial}. Wait for it, or stop it.") from error
        source = _fingerprint(plan.source)
        identity = {"version": __version__, "source": source, "tensors": _digest(plan)}
        if not noted.is_file() or _noted(noted) != identity:
            _clear(partial)
            write_whole(noted, json.dumps(identity, indent=1).encode())
        _check_room(partial, plan)
        yield partial
        (partial / _LOCK).unlink()
        noted.unlink()
        put_folder_in_place(partial, plan.target)


def _noted(file: Path) -> Any:
    """The identity that an earlier conversion wrote down; None where the file is damaged, so that it starts over."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None


def _fingerprint(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of a folder's files: enough to notice a change, without reading them."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _digest(plan: Plan) -> str:
    return hashlib.sha256(repr((plan.tensors, plan.files)).encode()).hexdigest()


def _clear(partial: Path) -> None:
    for path in partial.iterdir():
        if path.name == _LOCK:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_room(partial: Path, plan: Plan) -> None:
    written = sum(file.stat().st_size for file in partial.iterdir())
    needed, free = plan.num_bytes - written, shutil.disk_usage(partial).free
    if needed > free:
        reason = f"{gigabytes(needed)} more are needed there and {gigabytes(free)} are free"
        raise OSError(errno.ENOSPC, reason, str(partial))


def gigabytes(num_bytes: int) -> str:
    """A size for people, in units of 1000."""
    return f"{num_bytes / 1000**3:.2f} GB" if num_bytes >= 10**8 else f"{num_bytes / 1000**2:.2f} MB"
