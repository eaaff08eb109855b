"""The newest weights on disk, for servers that start anew or read them from there.

All nodes have the same weights, so one process of the run writes them, into a folder that all nodes see, and tells the
others where they lie.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Protocol

from safetensors.torch import save_file

from megatron_fipo.parallel.announcements import Announcements
from megatron_fipo.rollout.servers.api import Bucket
from megatron_fipo.rollout.servers.http import ServerError

_NOT_CONFIGURATION = {".safetensors", ".bin", ".pt", ".gguf"}
_INDEX = "model.safetensors.index.json"
_VISIBLE_WITHIN_S = 90.0
"""Network file systems may take up to a minute until another host's new folder is there."""
_POLL_S = 0.1


class Snapshots(Protocol):
    """The newest weights on disk as one process sees them: it writes them, or another one does for it."""

    def begin(self) -> None:
        """Begin the next snapshot; every process of the run begins each, or none does."""
        ...

    def add(self, bucket: Bucket) -> None:
        """Write a bucket, where this process writes."""
        ...

    def commit(self, version: str) -> Path:
        """The whole snapshot's folder, which this process's servers can read.

        Raises:
            OtherRankError: if the process that writes it has failed.
            ServerError: if the folder cannot be seen from here.
        """
        ...

    def abandon(self, reason: str) -> None:
        """Tell whoever waits for this process's snapshot that there will be none, unless it has been committed."""
        ...

    def keep_only(self, snapshot: Path) -> None:
        """Delete every other snapshot, if this process writes them."""
        ...


class SnapshotWriter:
    """`Snapshots` that this process writes: a Hugging Face folder, one file for each bucket.

    Args:
        folder: where snapshots lie, each in a folder of its own.
        base_folder: model folder whose configuration and tokenizer go along.
        announcements: tells the other nodes' processes of each snapshot; None where there are no others.
        private: whether nobody but this user may look into the folder.
    """

    def __init__(
        self,
        folder: Path,
        base_folder: str | Path,
        announcements: Announcements | None = None,
        *,
        private: bool = True,
    ) -> None:
        self._folder, self._base, self._announcements = folder, Path(base_folder), announcements
        self._mode = 0o700 if private else 0o777
        self._partial = folder / "partial"
        self._files: dict[str, str] = {}
        self._num_bytes = 0

    def begin(self) -> None:
        """Begin a snapshot, and delete what an unfinished one has written."""
        if self._announcements is not None:
            self._announcements.begin()
        shutil.rmtree(self._partial, ignore_errors=True)
        self._folder.mkdir(mode=self._mode, parents=True, exist_ok=True)
        self._partial.mkdir()
        self._files, self._num_bytes = {}, 0
        for file in self._base.iterdir():
            if file.is_file() and file.suffix not in _NOT_CONFIGURATION and not file.name.endswith(".index.json"):
                shutil.copy2(file, self._partial / file.name)

    def add(self, bucket: Bucket) -> None:
        """Write a bucket."""
        file = f"model-{len(set(self._files.values())) + 1:05d}.safetensors"
        # Copies: a file's tensors must not share the buffer, which is overwritten meanwhile.
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in bucket.tensors()}
        save_file(tensors, self._partial / file, metadata={"format": "pt"})
        self._files.update(dict.fromkeys(tensors, file))
        self._num_bytes += len(bucket.flat)

    def commit(self, version: str) -> Path:
        """Finish it. The folder appears whole or not at all; older ones stay until `keep_only`."""
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._files}
        (self._partial / _INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
        target = self._folder / f"version-{version}"
        if target.exists():  # the same version once more, after a failure
            shutil.rmtree(target)
        self._partial.rename(target)
        if self._announcements is not None:
            self._announcements.tell(str(target))
        return target

    def abandon(self, reason: str) -> None:
        """Let the other nodes' processes know that there will be no snapshot."""
        if self._announcements is not None:
            self._announcements.fail(reason)

    def keep_only(self, snapshot: Path) -> None:
        """Delete every other snapshot."""
        for folder in self._folder.iterdir():
            if folder != snapshot:
                shutil.rmtree(folder)


class SnapshotFollower:
    """`Snapshots` that another process writes.

    Args:
        announcements: tells of the writer's snapshots.
        timeout_s: longest wait for the announcement of one.
        visible_within_s: longest wait until its folder is there on this host.
    """

    def __init__(
        self, announcements: Announcements, timeout_s: float, visible_within_s: float = _VISIBLE_WITHIN_S
    ) -> None:
        self._announcements, self._timeout_s, self._visible_within_s = announcements, timeout_s, visible_within_s

    def begin(self) -> None:
        self._announcements.begin()

    def add(self, bucket: Bucket) -> None:
        pass

    def commit(self, version: str) -> Path:
        folder = Path(self._announcements.wait(self._timeout_s))
        deadline = time.monotonic() + self._visible_within_s
        while not (folder / _INDEX).is_file():
            if time.monotonic() > deadline:
                raise ServerError(
                    f"the weights of version {version} were written to {folder} and are not there on this node. Set "
                    "servers.snapshot_dir to a folder that all nodes see, or servers.keep_snapshot=false."
                )
            time.sleep(_POLL_S)
        return folder

    def abandon(self, reason: str) -> None:
        pass

    def keep_only(self, snapshot: Path) -> None:
        pass
