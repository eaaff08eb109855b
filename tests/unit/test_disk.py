"""Files and folders that are put in their place whole, or not at all, and are on the disk by then."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.system.disk import (
    DiskError,
    put_file_in_place,
    put_folder_in_place,
    write_text_whole,
    write_whole,
)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is waited for on the disk, and of what is renamed, in their order."""
    events: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def noting_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def noting_replace(source: Any, target: Any) -> None:
        events.append(f"name {Path(target).name}")
        replace(source, target)

    def noting_rename(source: Path, target: Path) -> Path:
        events.append(f"name {Path(target).name}")
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    monkeypatch.setattr(Path, "rename", noting_rename)
    return events


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_is_too(tmp_path: Path, order: list[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a").write_text("before")
    write_whole(folder / "a", b"after")
    assert order == ["sync a.partial", "name a", "sync folder"]
    assert (folder / "a").read_bytes() == b"after"
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, order: list[str]) -> None:
    new, old = tmp_path / "new.partial", tmp_path / "new"
    (new / "inner").mkdir(parents=True)
    (new / "a").write_text("1")
    (new / "inner" / "b").write_text("2")
    old.mkdir()
    (old / "c").write_text("3")
    put_folder_in_place(new, old)
    named = order.index("name new.replaced")
    assert sorted(order[:named]) == ["sync a", "sync b", "sync inner", "sync new.partial"]
    assert order[named:] == ["name new.replaced", "name new", f"sync {tmp_path.name}"]
    assert sorted(path.name for path in old.rglob("*")) == ["a", "b", "inner"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    file, folder = tmp_path / "a", tmp_path / "folder"
    file.write_text("before")
    folder.mkdir()
    (folder / "b").write_text("before")
    (tmp_path / "folder.partial").mkdir()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"after")
    with pytest.raises(OSError, match="No space left"):
        put_file_in_place(tmp_path / "a.partial", file)
    with pytest.raises(OSError, match="No space left"):
        put_folder_in_place(tmp_path / "folder.partial", folder)
    with pytest.raises(DiskError, match=r"a cannot be written: No space left.*start the same command again"):
        write_text_whole(file, "after")
    assert file.read_text() == "before"
    assert (folder / "b").read_text() == "before"


def test_text_makes_its_folder_and_keeps_a_lone_surrogate(tmp_path: Path) -> None:
    write_text_whole(tmp_path / "new" / "a", "\ud800")
    assert (tmp_path / "new" / "a").read_bytes() == b"\\ud800"
