"""The folder of a run's checkpoints: names, the order in which they may be trusted, and what is deleted when.

    checkpoints/step_000010/               a whole checkpoint: 10 steps are done
    checkpoints/step_000010_update_0003/   saved by a signal, after 3 updates of the step that follows
    checkpoints/latest                     the name of the newest

A checkpoint is written into a folder whose name ends in .partial and a word of its own, and renamed when it is whole;
`latest` is moved last. Whenever a run is killed, `latest` names a whole checkpoint. One that is saved anew, as by a run
that is resumed and stopped again before its next step, goes to step_000010.again, and the next time to step_000010:
what `latest` names is never overwritten. manifest.json lists every file with its size and CRC-32, and has a CRC-32 of
its own. Manifests from before it had one are read, too.
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

MANIFEST = "manifest.json"
_LATEST = "latest"
_PARTIAL = ".partial"
_READ_BYTES = 1 << 24
_NAME = re.compile(r"step_(\d+)(_update_\d+)?(\.again)?")


def checkpoint_name(step: int, num_updates: int = 0) -> str:
    """Name of a checkpoint after so many whole steps and so many updates of the next."""
    return f"step_{step:06d}" + (f"_update_{num_updates:04d}" if num_updates else "")


def step_of(checkpoint: Path) -> int:
    """Whole steps that are done in a checkpoint, from its name."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match, f"{checkpoint} is no checkpoint's name"
    return int(match[1])


def latest_name(root: Path) -> str | None:
    """What `latest` says, fit to be printed whatever it says; None where there is none."""
    pointer = root / _LATEST
    if not pointer.is_file():
        return None
    said = pointer.read_bytes()[:256].decode("utf-8", "backslashreplace").strip()
    return said.encode("unicode_escape").decode("ascii")


def by_trust(root: Path) -> list[Path]:
    """Checkpoints in the order in which they are to be tried: the one that `latest` names, then newest first."""
    named = (path for path in root.glob("step_*") if _NAME.fullmatch(path.name))  # others are not a run's
    found = sorted((path for path in named if path.is_dir()), reverse=True)
    name = latest_name(root)
    return sorted(found, key=lambda path: path.name != name)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none.

    Raises:
        ValueError: if `latest` names a checkpoint that is not there.
    """
    root = Path(folder)
    name = latest_name(root)
    if name is None:
        return None
    if not (root / name).is_dir():
        raise ValueError(
            f"{root / _LATEST} names {name}, which is not there. Write the name of a whole checkpoint into "
            "it, or delete it to start over."
        )
    return root / name


def begin(root: Path, name: str) -> tuple[Path, Path]:
    """Make the folder to write into and clear away what killed runs left behind. One rank alone calls this.

    Returns:
        (the partial folder, under a name that no process of an earlier run can still be writing to; what it becomes).
    """
    root.mkdir(parents=True, exist_ok=True)
    for old in root.glob(f"*{_PARTIAL}*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    target = root / (f"{name}.again" if latest_name(root) == name else name)
    partial = root / f"{target.name}{_PARTIAL}.{secrets.token_hex(4)}"
    partial.mkdir()
    return partial, target


def publish(partial: Path, target: Path) -> None:
    """Give a whole checkpoint its name, then move `latest` to it. One rank alone calls this."""
    root = target.parent
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    pointer = root / f"{_LATEST}{_PARTIAL}"
    pointer.write_text(target.name + "\n", encoding="utf-8")
    pointer.rename(root / _LATEST)
    twin = target.name.removesuffix(".again") if target.suffix == ".again" else f"{target.name}.again"
    if (root / twin).exists():
        shutil.rmtree(root / twin)


def delete_old(root: Path, keep_last: int, keep_every: int) -> None:
    """Delete all but the newest `keep_last`, the one that `latest` names, and every `keep_every`-th whole step."""
    for position, path in enumerate(by_trust(root)):
        is_kept_for_good = keep_every and step_of(path) % keep_every == 0 and "_update_" not in path.name
        if position >= keep_last and not is_kept_for_good:
            shutil.rmtree(path)


def file_names(folder: Path) -> list[str]:
    """Every file of a checkpoint but its manifest, relative, sorted."""
    files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST)


def describe_files(folder: Path, names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of files: they are read whole."""
    found = {}
    for name in names:
        crc, size = 0, 0
        with (folder / name).open("rb") as file:
            while block := file.read(_READ_BYTES):
                crc, size = zlib.crc32(block, crc), size + len(block)
        found[name] = {"bytes": size, "crc32": crc}
    return found


def write_manifest(folder: Path, files: Mapping[str, Mapping[str, int]]) -> None:
    """Note what belongs to a checkpoint."""
    text = json.dumps({"files": dict(sorted(files.items())), "crc32": _own_crc(files)}, indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _own_crc(files: Mapping[str, Mapping[str, int]]) -> int:
    """CRC-32 of what a manifest says, however it is spaced."""
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def read_manifest(folder: Path) -> dict[str, dict[str, int]]:
    """The files of a checkpoint.

    Raises:
        ValueError: if there is no manifest, it cannot be read, or it is not as it was written; the message says which.
    """
    path = folder / MANIFEST
    if path.exists() and not path.is_file():  # a pipe would be waited for
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
    """Whether it describes a file that lies in the checkpoint."""
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
