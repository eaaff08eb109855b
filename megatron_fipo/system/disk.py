"""Writes to disks that may be full, go away or be emptied during a run: whole or not at all, with errors in words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class DiskError(RuntimeError):
    """Something could not be written. What was written before is as it was, and a run can continue from it."""


GOES_ON = "it goes on from the newest checkpoint and the recorded rollouts"


def disk_error(
    path: str | Path, error: OSError, what_then: str = GOES_ON, place: str | Path | None = None
) -> DiskError:
    """An error that says what happened to which file, how much room there is, and what to do.

    Args:
        path: the file, or words that name it.
        what_then: what the same command does when it is started again.
        place: where to look for room; None: at the path.
    """
    reason = error.strerror or str(error) or type(error).__name__
    return DiskError(
        f"{path} cannot be written: {reason}{free_space(place or path)}. What was written before is whole. Make room "
        f"or mend the folder's permissions, and start the same command again: {what_then}."
    )


def free_space(path: str | Path) -> str:
    """` (0.3 GiB are free there)`, or nothing where that cannot be told."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        return f" ({shutil.disk_usage(place).free / 2**30:.1f} GiB are free there)"
    except OSError:
        return ""


@contextmanager
def writing(path: str | Path, what_then: str = GOES_ON) -> Iterator[None]:
    """An OSError inside becomes a `DiskError` about the path."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error, what_then) from error


def append_whole(file: IO[bytes], data: bytes, path: Path) -> None:
    """Append all of the data or none of it.

    Args:
        file: opened for appending without a buffer, by this process alone.
        path: the path under which it was opened.

    Raises:
        DiskError: if there is no room, or the file was deleted since it was opened. A part that was written is
            removed again.
    """
    descriptor = file.fileno()
    try:
        state = os.fstat(descriptor)
        if state.st_nlink == 0:
            raise deleted(path)
        rest = memoryview(data)
        try:
            while rest:  # the system may take a part without calling it an error
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            os.ftruncate(descriptor, state.st_size)
            raise
    except OSError as error:
        raise disk_error(path, error) from error


def deleted(path: Path) -> DiskError:
    """The error of a file or folder that a run writes to and that somebody has taken away."""
    return DiskError(
        f"{path} was deleted or replaced while the run was writing there. Nothing that it writes would be found "
        "again, and "
        "another run may take the folder, so it stops. Restore the folder from a copy and start the same command "
        "again, or "
        "start anew."
    )


def write_text_whole(path: Path, text: str, what_then: str = GOES_ON) -> None:
    """Write a file so that it is either as before or whole; a lone surrogate is written as JSON escapes it.

    Raises:
        DiskError: if it cannot be written.
    """
    with writing(path, what_then):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode("utf-8", "backslashreplace"))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either as before or whole, also after a loss of power. Its folder exists.

    Raises:
        OSError: if it cannot be written.
    """
    unfinished = path.with_name(f"{path.name}.partial")
    unfinished.write_bytes(content)
    put_file_in_place(unfinished, path)


def put_file_in_place(unfinished: Path, path: Path) -> None:
    """Give a file that is written its name, in the same folder, once its content is on the disk.

    Raises:
        OSError: if either cannot be done; what had the name still has it then.
    """
    sync(unfinished)
    os.replace(unfinished, path)
    sync(path.parent)


def put_folder_in_place(unfinished: Path, path: Path) -> None:
    """Give a folder that is written its name, in the same folder, once all its files are on the disk.

    A folder that has the name already is set aside under `<name>.replaced` and deleted when the new one has the name.

    Raises:
        OSError: if it cannot be done.
    """
    sync_folder(unfinished)
    replaced = path.with_name(f"{path.name}.replaced")
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    unfinished.rename(path)
    sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Wait until all files in a folder and its subfolders are on the disk, with their names."""
    for folder, _, files in os.walk(path):
        for name in (*files, "."):
            sync(Path(folder, name))


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
