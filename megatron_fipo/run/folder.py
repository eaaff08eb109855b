"""The folder a run writes into, and what is written there before anything is trained.

config.yaml  provenance.json  metrics.jsonl  tensorboard/  samples/  traces/  evaluation/  rollouts/  servers/
checkpoints/  huggingface/  best/  run.lock
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_fipo.config import Config, save_resolved
from megatron_fipo.metrics.provenance import save_provenance
from megatron_fipo.system.disk import deleted, disk_error, writing

_LOCK = "run.lock"
_BEFORE_A_RUN = {"evaluation", "jobs", "servers"}
"""Folders that commands make in a run's folder before the run itself begins."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    root: Path

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def samples(self) -> Path:
        return self.root / "samples"

    @property
    def traces(self) -> Path:
        return self.root / "traces"

    @property
    def rollouts(self) -> Path:
        return self.root / "rollouts"

    @property
    def servers(self) -> Path:
        return self.root / "servers"

    @property
    def huggingface(self) -> Path:
        return self.root / "huggingface"

    @property
    def best(self) -> Path:
        return self.root / "best"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"


class RunLock:
    """Holds a run's folder for one run, as long as the process lives. Only one rank may take it.

    A POSIX record lock: the kernel (on NFS the server) drops it when the process ends, however it ends, and child
    processes do not inherit it.
    """

    def __init__(self, root: Path) -> None:
        """
        Raises:
            ValueError: if another process holds the folder, saying which.
        """
        path = root / _LOCK
        self._root, self._path = root, path
        self._file: IO[str] = path.open("a+", encoding="utf-8", errors="backslashreplace")
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read(300).strip() or "another process"
            self._file.close()
            raise ValueError(
                f"run.output_dir={root}: another run is writing there ({holder}). Two would destroy each other's "
                "checkpoints: wait for it, stop it, or set another run.output_dir."
            ) from error
        self._file.truncate(0)
        self._file.write(
            f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        )
        self._file.flush()

    def check(self) -> None:
        """See that the folder is still the one that was locked.

        Raises:
            DiskError: if it, or its lock, was deleted or replaced: another run could take it.
        """
        held = os.fstat(self._file.fileno())
        try:
            found = self._path.stat()
        except FileNotFoundError:
            raise deleted(self._root if not self._root.exists() else self._path) from None
        except OSError as error:
            raise disk_error(self._path, error) from error
        if (found.st_dev, found.st_ino) != (held.st_dev, held.st_ino):
            raise deleted(self._root)

    def release(self) -> None:
        """Let another run have the folder."""
        self._file.close()


def prepare(config: Config) -> tuple[RunFolder, RunLock, str]:
    """Make the run's folder and lock it. Only one rank may call this.

    With train.resume=false a folder of an earlier run is renamed, never overwritten; a folder of anything else is
    refused. The configuration is not written yet (`record_config` does that): a run that may not resume is to leave
    the old one's as it was.

    Returns:
        (the folder, its lock, a line about what was set aside, or empty).

    Raises:
        ValueError: if the folder cannot be written to, another run is writing to it, or it is to be set aside and is no
            run's.
    """
    folder = RunFolder(Path(config.run.output_dir))
    note = ""
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        if config.train.resume:
            _check_places(folder)
        else:
            _check_is_a_runs(folder.root)
        lock = RunLock(folder.root)
        if not config.train.resume and any(path.name != _LOCK for path in folder.root.iterdir()):
            aside = _free_name(folder.root)
            folder.root.rename(aside)
            lock.release()
            folder.root.mkdir()
            lock = RunLock(folder.root)
            note = f"train.resume=false: the earlier run in {folder.root} was renamed to {aside}"
    except OSError as error:
        raise ValueError(
            f"run.output_dir={folder.root} cannot be written to: {error.strerror or error}. Mend its permissions, make "
            "room, or set another run.output_dir."
        ) from error
    return folder, lock, note


def _check_places(folder: RunFolder) -> None:
    """Refuse what could not be written to later, before anything is trained."""
    for place in (folder.checkpoints, folder.rollouts, folder.samples, folder.evaluation, folder.servers):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is no folder, and a run keeps files in one of that name. Move it elsewhere.")
    if folder.metrics.exists() and not folder.metrics.is_file():
        raise ValueError(f"{folder.metrics} is no file, and a run writes its metrics there. Move it elsewhere.")


def _check_is_a_runs(root: Path) -> None:
    """Refuse to set aside a folder that no run has made, whatever else lies in it.

    A run leaves its lock, or its configuration with its provenance; what is done before it leaves only folders of its
    own.
    """
    names = {path.name for path in root.iterdir()}
    if _LOCK in names or {"config.yaml", "provenance.json"} <= names or names <= _BEFORE_A_RUN:
        return
    others = ", ".join(ascii(name)[1:-1] for name in sorted(names)[:3])
    raise ValueError(
        f"run.output_dir={root} holds {others}{' and more' if len(names) > 3 else ''}, and no run has written there; "
        "train.resume=false would rename it. Set another run.output_dir, or move what is in it yourself."
    )


def record_config(config: Config, folder: RunFolder, origins: Mapping[str, Any] | None = None) -> None:
    """Write the run's configuration and provenance into its folder. Only one rank may call this.

    Args:
        origins: where models and data that the configuration names on the hub came from.

    Raises:
        DiskError: if they cannot be written.
    """
    with writing(folder.root):
        save_resolved(config, folder.root)
        save_provenance(folder.root, origins)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return candidate
