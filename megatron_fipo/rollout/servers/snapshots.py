"""The newest weights on disk, for servers that start anew or read them from there.

All nodes have the same weights, so one process of the run writes them, into a folder that all nodes see, and tells the
others where they lie. A thread of its own writes them, while the run goes on: an update takes a copy in the host's
memory, and the next one waits until that has been written. So there is never more than one copy of the model.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from safetensors.torch import save_file

from megatron_fipo.parallel.announcements import Announcements
from megatron_fipo.rollout.servers.api import Bucket
from megatron_fipo.rollout.servers.backlog import Backlog
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.system.disk import DiskError, free_space

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NOT_CONFIGURATION = {".safetensors", ".bin", ".pt", ".gguf"}
_INDEX = "model.safetensors.index.json"
_VISIBLE_WITHIN_S = 90.0
"""Network file systems may take up to a minute until another host's new folder is there."""
_POLL_S = 0.1


class Snapshots(Protocol):
    """The newest weights on disk as one process sees them: it writes them, or another one does for it."""

    def begin(self) -> None:
        """Begin the next snapshot; every process of the run begins each, or none does.

        This waits until the one before is whole.

        Raises:
            DiskError: if that could not be written, or older ones not be deleted.
            OtherRankError: if the process that writes it has failed.
            ServerError: if it cannot be seen from here.
        """
        ...

    def add(self, bucket: Bucket) -> None:
        """Take a copy of a bucket, where this process writes."""
        ...

    def commit(self, version: str) -> Future[Path]:
        """The whole snapshot's folder, which this process's servers can read, as soon as it is there.

        The future raises what the next `begin` raises. Cancelling it does nothing.
        """
        ...

    def abandon(self, error: BaseException) -> None:
        """Take note that the update has failed with an error.

        Whoever waits for this process's snapshot hears that there will be none, unless it has been committed.
        """
        ...

    def keep_only(self, snapshot: Future[Path]) -> None:
        """Delete every other snapshot once this one is there, if this process writes them."""
        ...

    def close(self) -> None:
        """Wait until everything is written.

        Raises:
            DiskError: see `begin`.
        """
        ...


class SnapshotWriter:
    """`Snapshots` that this process writes: a Hugging Face folder, one file for each bucket.

    A folder `version-...` is whole: what is not, lies in `partial`, also after the process was killed.

    Args:
        folder: where snapshots lie, each in a folder of its own.
        base_folder: model folder whose configuration and tokenizer go along.
        announcements: tells the other nodes' processes of each snapshot; None where there are no others.
        private: whether nobody but this user may look into the folder.
        executor: writes, one file after the other; see `Backlog`.
    """

    def __init__(
        self,
        folder: Path,
        base_folder: str | Path,
        announcements: Announcements | None = None,
        *,
        private: bool = True,
        executor: Executor | None = None,
    ) -> None:
        self._folder, self._base, self._announcements = folder, Path(base_folder), announcements
        self._private = private
        self._partial = folder / "partial"
        self._backlog = Backlog("snapshots", executor)
        self._files: dict[str, str] = {}
        self._num_bytes = 0
        self._is_open = False

    def begin(self) -> None:
        """Begin a snapshot, once the one before is written, and delete what an unfinished one has left."""
        failure = self._backlog.take_failure()
        if self._announcements is not None:
            self._announcements.begin()  # also where the last one failed: others have begun this one
        self._is_open = True
        if failure is not None:
            raise failure
        self._files, self._num_bytes = {}, 0
        self._backlog.add(self._unless_failed(self._make_folder))

    def add(self, bucket: Bucket) -> None:
        """Copy a bucket, and have the copy written."""
        file = f"model-{len(set(self._files.values())) + 1:05d}.safetensors"
        # Its buffer is overwritten meanwhile. Pinned memory takes a copy from a GPU several times as fast; torch keeps
        # it, and the next snapshot's buckets are as large.
        flat = torch.empty(len(bucket.flat), dtype=torch.uint8, pin_memory=bucket.flat.is_cuda)
        flat.copy_(bucket.flat)
        self._files.update(dict.fromkeys((spec.name for spec in bucket.specs), file))
        self._num_bytes += len(flat)
        self._backlog.add(self._unless_failed(partial(self._write, Bucket(flat, bucket.specs), file)))

    def commit(self, version: str) -> Future[Path]:
        """Have it finished. The folder appears whole or not at all; older ones stay until `keep_only`."""
        index = {"metadata": {"total_size": self._num_bytes}, "weight_map": self._files}
        finish = self._unless_failed(partial(self._finish, version, json.dumps(index, indent=1)))
        self._is_open = False
        return self._backlog.add(partial(self._announced, finish))

    def abandon(self, error: BaseException) -> None:
        """Let the other nodes' processes know that there will be no snapshot."""
        self._backlog.forget(error)
        if self._announcements is not None and self._is_open:
            self._announcements.fail(str(error) or type(error).__name__)
        self._is_open = False

    def keep_only(self, snapshot: Future[Path]) -> None:
        """Have every other snapshot deleted."""
        self._backlog.add(self._unless_failed(lambda: self._delete_all_but(snapshot.result())))

    def close(self) -> None:
        """Wait until everything is written, end the thread, and raise what has not been raised yet."""
        if (failure := self._backlog.close()) is not None:
            raise failure

    # --- in the thread that writes ----------------------------------------------------------------------------------

    def _unless_failed(self, job: Callable[[], T]) -> Callable[[], T]:
        """The job, unless one before it has failed, with that failure; its own failure in words."""

        def attempt() -> T:
            if self._backlog.failure is not None:
                raise self._backlog.failure
            try:
                return job()
            except Exception as error:  # safetensors has an error of its own for a full disk
                raise DiskError(
                    f"the weights for servers that start anew could not be written to {self._folder}: "
                    f"{str(error) or type(error).__name__}{free_space(self._folder)}. Make room or mend the folder's "
                    "permissions, set servers.snapshot_dir to another folder, or servers.keep_snapshot=false. The same "
                    "command goes on from the newest checkpoint."
                ) from error

        return attempt

    def _make_folder(self) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        self._folder.mkdir(mode=0o700 if self._private else 0o777, parents=True, exist_ok=True)
        self._partial.mkdir()
        for file in self._base.iterdir():
            if file.is_file() and file.suffix not in _NOT_CONFIGURATION and not file.name.endswith(".index.json"):
                shutil.copy2(file, self._partial / file.name)

    def _write(self, bucket: Bucket, file: str) -> None:
        save_file(dict(bucket.tensors()), self._partial / file, metadata={"format": "pt"})
        if not self._private:
            (self._partial / file).chmod(0o644)  # safetensors lets nobody else read it

    def _finish(self, version: str, index: str) -> Path:
        (self._partial / _INDEX).write_text(index, encoding="utf-8")
        target = self._folder / f"version-{version}"
        if target.exists():  # the same version once more, after a failure
            shutil.rmtree(target)
        self._partial.rename(target)
        return target

    def _announced(self, finish: Callable[[], Path]) -> Path:
        """Finish, and tell the other nodes' processes what has become of it."""
        try:
            target = finish()
        except DiskError as error:
            if self._announcements is not None:
                self._announcements.fail(str(error))
            raise
        if self._announcements is not None:
            self._announcements.tell(str(target))
        return target

    def _delete_all_but(self, snapshot: Path) -> None:
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
        self._backlog = Backlog("snapshots of another process")
        self._is_closed = threading.Event()

    def begin(self) -> None:
        failure = self._backlog.take_failure()
        self._announcements.begin()
        if failure is not None:
            raise failure

    def add(self, bucket: Bucket) -> None:
        pass

    def commit(self, version: str) -> Future[Path]:
        return self._backlog.add(partial(self._folder_of, version))

    def abandon(self, error: BaseException) -> None:
        self._backlog.forget(error)

    def keep_only(self, snapshot: Future[Path]) -> None:
        pass

    def close(self) -> None:
        """Stop waiting. No server of this process needs a snapshot any more; what went wrong with the last is told."""
        failure = self._backlog.failure
        self._is_closed.set()
        self._backlog.close()
        if failure is not None:
            logger.warning("the last weights did not come to this node's disk: %s", failure)

    def _folder_of(self, version: str) -> Path:
        """Wait for the folder, in the backlog's thread."""
        folder = Path(self._announcements.wait(self._timeout_s, self._is_closed))
        deadline = time.monotonic() + self._visible_within_s
        while not (folder / _INDEX).is_file():
            if time.monotonic() > deadline or self._is_closed.is_set():
                raise ServerError(
                    f"the weights of version {version} were written to {folder} and are not there on this node. Set "
                    "servers.snapshot_dir to a folder that all nodes see, or servers.keep_snapshot=false."
                )
            self._is_closed.wait(_POLL_S)
        return folder
