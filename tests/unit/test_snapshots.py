"""The newest weights on disk: written by a thread of its own, whole or not at all, and no failure is lost."""

from __future__ import annotations

import json
import resource
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_fipo.rollout.servers import backlog, snapshots
from megatron_fipo.rollout.servers.snapshots import SnapshotWriter
from megatron_fipo.rollout.servers.weight_buckets import Bucket, pack
from megatron_fipo.system.disk import DiskError
from tests.models import load, save_random_model

pytestmark = pytest.mark.slow


class Disk:
    """The disk, on which no tensor is written while the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk, save_file = Disk(), snapshots.save_file

    def save(*arguments: Any, **keywords: Any) -> None:
        disk.gate.wait()
        save_file(*arguments, **keywords)

    monkeypatch.setattr(snapshots, "save_file", save)
    yield disk
    disk.gate.set()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model's folder, of which a snapshot takes the configuration."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("the weights that the run began with")
    return folder


def buckets(value: float, bucket_bytes: int = 32) -> Iterable[Bucket]:
    tensors = [(name, torch.full((4,), value + place)) for place, name in enumerate("abc")]
    return pack(iter(tensors), bucket_bytes, torch.float32, torch.device("cpu"))


def write(writer: SnapshotWriter, version: str) -> Future[Path]:
    writer.begin()
    for bucket in buckets(float(version)):
        writer.add(bucket)
        bucket.flat.fill_(255)  # as the next bucket does
    return writer.commit(version)


def expect_whole(folder: Path, version: str) -> None:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys()
    for place, name in enumerate("abc"):
        assert torch.equal(found[name], torch.full((4,), float(version) + place))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_snapshot_is_a_model_folder(tmp_path: Path) -> None:
    base, other = save_random_model(tmp_path / "base"), load(save_random_model(tmp_path / "other", seed=1))
    (base / "tokenizer.json").write_text("{}")
    writer = SnapshotWriter(tmp_path / "snapshots", base)
    folders = []
    for version in ("7", "8"):
        writer.begin()
        for bucket in pack(iter(other.state_dict().items()), 20_000, torch.float32, torch.device("cpu")):
            writer.add(bucket)
        folders.append(writer.commit(version))
    loaded = load(folders[0].result()).state_dict()
    assert loaded.keys() == other.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in other.state_dict().items())
    assert (folders[0].result() / "tokenizer.json").exists()
    assert len(list(folders[0].result().glob("*.safetensors"))) > 2
    assert (tmp_path / "snapshots").stat().st_mode & 0o077 == 0, "for this user's servers alone"
    index = json.loads((folders[0].result() / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in other.state_dict().values())
    writer.keep_only(folders[1])
    writer.close()
    assert list((tmp_path / "snapshots").iterdir()) == [folders[1].result()]


def test_servers_of_others_can_read_every_file(tmp_path: Path, base: Path) -> None:
    for private in (True, False):
        writer = SnapshotWriter(tmp_path / f"private-{private}", base, private=private)
        folder = write(writer, "1").result()
        writer.close()
        modes = {file.stat().st_mode & 0o004 for file in folder.iterdir()}
        assert (folder.parent.stat().st_mode & 0o005 == 0) is private
        assert private or modes == {0o004}


def test_what_is_not_whole_is_no_snapshot(tmp_path: Path, base: Path, disk: Disk) -> None:
    """Whenever the process is killed: until the last byte is written there is no folder of that name."""
    place = tmp_path / "snapshots"
    writer = SnapshotWriter(place, base)
    write(writer, "1").result()
    disk.gate.clear()
    second = write(writer, "2")
    assert not second.done()
    assert {"version-1"} <= set(names(place)) <= {"partial", "version-1"}
    disk.gate.set()
    expect_whole(second.result(), "2")
    assert names(place) == ["version-1", "version-2"]
    writer.begin()
    writer.add(next(iter(buckets(3.0))))
    writer.close()
    assert names(place / "partial") == ["config.json", "model-00001.safetensors"]
    again = SnapshotWriter(place, base)
    again.begin()
    again.close()
    assert names(place / "partial") == ["config.json"], "nothing of the unfinished one gets into the next"


def test_the_next_one_waits_and_then_no_copy_is_left(
    tmp_path: Path, base: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[weakref.ref[Bucket]] = []

    def copied(*arguments: Any) -> Bucket:
        bucket = Bucket(*arguments)
        copies.append(weakref.ref(bucket))
        return bucket

    monkeypatch.setattr(snapshots, "Bucket", copied)
    writer = SnapshotWriter(tmp_path / "snapshots", base)
    disk.gate.clear()
    first = write(writer, "1")
    assert sum(copy() is not None for copy in copies) == 2, "the disk has not taken them yet"
    wait, found_written = backlog.wait, []

    def open_the_gate_and_wait(futures: list[Future[Any]]) -> object:
        found_written.append(first.done())
        disk.gate.set()
        return wait(futures)

    monkeypatch.setattr(backlog, "wait", open_the_gate_and_wait)
    writer.begin()
    assert found_written == [False]
    assert first.done()
    assert [copy() for copy in copies] == [None, None]
    writer.close()
    expect_whole(first.result(), "1")


def no_room_for_tensors(writer: SnapshotWriter, place: Path) -> None:
    """Files cannot become longer than a few bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
    try:
        assert isinstance(write(writer, "1").exception(), DiskError)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_folder(writer: SnapshotWriter, place: Path) -> None:
    place.write_text("a file is in its place")
    assert isinstance(write(writer, "1").exception(), DiskError)
    place.unlink()


def older_one_cannot_be_deleted(writer: SnapshotWriter, place: Path) -> None:
    place.mkdir()
    (place / "a file").write_text("which is no folder")
    written = write(writer, "1")
    writer.keep_only(written)
    expect_whole(written.result(), "1")


@pytest.mark.parametrize("fail", [no_room_for_tensors, no_folder, older_one_cannot_be_deleted])
@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_failure_is_raised_once_by_the_next_one_or_at_the_end(
    tmp_path: Path, base: Path, fail: Callable[[SnapshotWriter, Path], None], at_the_end: bool
) -> None:
    place = tmp_path / "snapshots"
    writer = SnapshotWriter(place, base)
    fail(writer, place)
    words = (
        rf"written to {place}: .*(File too large|File exists|Not a directory).*free there\)\. .*servers\.snapshot_dir"
    )
    with pytest.raises(DiskError, match=words):
        writer.close() if at_the_end else writer.begin()
    if not at_the_end:
        expect_whole(write(writer, "2").result(), "2")
        writer.close()


def test_what_has_been_raised_is_not_raised_again(tmp_path: Path, base: Path) -> None:
    (tmp_path / "snapshots").write_text("a file is in its place")
    writer = SnapshotWriter(tmp_path / "snapshots", base)
    with pytest.raises(DiskError) as caught:
        write(writer, "1").result()
    writer.abandon(ValueError("something else"))
    writer.abandon(caught.value)
    writer.close()


def test_nobody_who_stops_waiting_ends_the_writing(tmp_path: Path, base: Path, disk: Disk) -> None:
    disk.gate.clear()
    writer = SnapshotWriter(tmp_path / "snapshots", base)
    written = write(writer, "1")
    assert not written.cancel()
    disk.gate.set()
    writer.close()
    expect_whole(written.result(), "1")
