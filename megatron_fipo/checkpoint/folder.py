"""The folder of a run's checkpoints: their names, the order in which they are tried, and what is deleted when.

    checkpoints/step_000010/               a whole checkpoint: 10 steps are done
    checkpoints/step_000010_update_0003/   saved by a signal, after 3 updates of the step that follows
    checkpoints/latest                     the name of the newest

A checkpoint is written into a folder whose name ends in .partial and a random word, and renamed when it is whole;
`latest` is moved last. So `latest` names a whole checkpoint, whenever the run is killed. A run that is resumed and
stopped again before its next step saves the same step anew: to step_000010.again, and the time after that to
step_000010, so that the one that `latest` names is never overwritten. manifest.json lists every file with its size and
CRC-32, and has a CRC-32 of its own. Manifests that were written before they had one are read, too.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from megatron_fipo.system.disk import sync_folder, write_whole

MANIFEST = "manifest.json"
_LATEST = "latest"
_PARTIAL = ".partial"
_READ_BYTES = 1 << 24
_NAME = re.compile(r"step_(\d+)(_update_\d+)?(\.again)?")


def checkpoint_name(step: int, num_updates: int = 0) -> str:
    """Name of a checkpoint after `step` whole steps and `num_updates` updates of the next."""
    return f"step_{step:06d}" + (f"_update_{num_updates:04d}" if num_updates else "")


def step_of(checkpoint: Path) -> int:
    """The number of whole steps that a checkpoint's name says are done."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is no checkpoint's name"
    return int(match[1])


def latest_name(root: Path) -> str | None:
    """What the file `latest` says, escaped so that it can be printed whatever that is; None where there is no file."""
    pointer = root / _LATEST
    if not pointer.is_file():
        return None
    said = pointer.read_bytes()[:256].decode("utf-8", "backslashreplace").strip()
    return said.encode("unicode_escape").decode("ascii")


def latest_first(root: Path) -> list[Path]:
    """All checkpoints in the order in which they are tried: the one that `latest` names, then the newest first."""
    named = (path for path in root.glob("step_*") if _NAME.fullmatch(path.name))  # others are not a run's
    found = sorted((path for path in named if path.is_dir()), reverse=True)
    name = latest_name(root)
    return sorted(found, key=lambda path: path.name != name)


def begin(root: Path, name: str) -> tuple[Path, Path]:
    """Make the folder to write into and clear away what killed runs left behind. Only one rank may call this.

    Returns:
        (the partial folder, under a name that no process of an earlier run can still be writing to; the folder that it
        becomes).
    """
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(f"*{_PARTIAL}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    target = root / (f"{name}.again" if latest_name(root) == name else name)
    partial = root / f"{target.name}{_PARTIAL}.{secrets.token_hex(4)}"
    partial.mkdir()
    return partial, target


def publish(partial: Path, target: Path) -> None:
    """Give a whole checkpoint its name, then move `latest` to it. Only one rank may call this.

    Both survive a loss of power from then on. It costs little: Megatron's writers have synced the large files.
    """
    root = target.parent
    if target.exists():
        shutil.rmtree(target)
    sync_folder(partial)
    partial.rename(target)
    write_whole(root / _LATEST, f"{target.name}\n".encode())
    twin = target.name.removesuffix(".again") if target.suffix == ".again" else f"{target.name}.again"
    if (root / twin).exists():
        shutil.rmtree(root / twin)


def delete_old(root: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last`, the one that `latest` names, and every `keep_every`-th whole step."""
    for position, path in enumerate(latest_first(root)):
        is_kept_for_good = keep_every and step_of(path) % keep_every == 0 and "_update_" not in path.name
        if position >= keep_last and not is_kept_for_good:
            shutil.rmtree(path)


def file_names(folder: Path) -> list[str]:
    """The names of a checkpoint's files, relative to its folder and sorted; the manifest is left out."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def describe_files(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Read files to their ends and return size and CRC-32 of each."""
    found = {}
    for name in names:
        crc, size = 0, 0
        with (folder / name).open("rb") as file:
            while block := file.read(_READ_BYTES):
                crc, size = zlib.crc32(block, crc), size + len(block)
        found[name] = {"bytes": size, "crc32": crc}
    return found


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Write the list of a checkpoint's files."""
    text = json.dumps({"files": dict(sorted(files.items())), "crc32": _own_crc(files)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _own_crc(files: Mapping[str, Mapping[str, int]]) -> int:
    """CRC-32 of a manifest's contents, which does not depend on its spaces."""
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, dict[str, int]]:
    """The files of a checkpoint.

    Raises:
        ValueError: if there is no manifest, it cannot be read, or it is not as it was written; the message says which.
    """
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # reading a pipe would block
        raise ValueError(f"{path} is no file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except (OSError, ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise ValueError(f"{path} cannot be read ({error!r})") from error
    if not isinstance(manifest, dict) or not {"files"} <= manifest.keys() <= {"files", "crc32"}:
        raise ValueError(f"{path} has changed since it was written (it is no list of files)")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise ValueError(f"{path} has changed since it was written (an entry is not that of a file)")
    if "crc32" in manifest and manifest["crc32"] != _own_crc(files):
        raise ValueError(f"{path} has changed since it was written (its CRC-32 differs)")
    if unlisted := [name for name in file_names(folder) if name not in files and _is_loaded(name)]:
        raise ValueError(f"{path} does not list {', '.join(unlisted[:3])}, which is there")
    return files


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an entry is there twice")
    return found


def _is_entry(name: str, entry: Any) -> bool:
    """Whether a manifest's entry describes a file that lies in the checkpoint."""
    is_inside = bool(name) and not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
    return (
        is_inside
        and "\0" not in name
        and isinstance(entry, dict)
        and entry.keys() == {"bytes", "crc32"}
        and all(type(number) is int and number >= 0 for number in entry.values())
    )


def _is_loaded(name: str) -> bool:
    """Whether a loader would read the file; others, such as a note that somebody has left, do no harm."""
    return name.endswith(".distcp") or name in (".metadata", "metadata.json", "common.pt")


def faults(folder: Path, names: Sequence[str], files: Mapping[str, Mapping[str, int]]) -> list[str]:
    """What is wrong with some files of a checkpoint: missing, of another size, or changed."""
    found = []
    for name in names:
        if not (folder / name).is_file():
            found.append(f"{name!a} is missing" if not name.isprintable() else f"{name} is missing")
            continue
        size = (folder / name).stat().st_size
        if size != files[name]["bytes"]:
            found.append(f"{name} has {size} bytes instead of {files[name]['bytes']}")
        elif describe_files(folder, [name])[name]["crc32"] != files[name]["crc32"]:
            found.append(f"{name} has changed since it was written (its CRC-32 differs)")
    return found
