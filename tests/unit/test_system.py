"""What stands in one place for the whole package: digests, suggestions, whole files, the end of a parent."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_fipo.system import disk
from megatron_fipo.system.digests import fingerprint, hashed_seed
from megatron_fipo.system.nearest_name import did_you_mean, nearest_name
from megatron_fipo.system.parent_death import signal_when_parent_ends


def test_a_fingerprint_depends_on_values_and_not_on_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    assert fingerprint({"path": Path("/data")}) == fingerprint({"path": "/data"})
    assert len({fingerprint(value) for value in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": [1]}, {"a": "1"}, {})}) == 6
    # Fingerprints lie in checkpoints and in the folders of recorded responses: another form of them would reject both.
    assert fingerprint({"run.seed": 0, "model.dtype": "bfloat16"}) == "3a64d0e91095315cc1e831df825b17b6"


def test_a_hashed_seed_depends_on_each_number_and_on_their_order() -> None:
    seeds = [hashed_seed(*parts) for parts in ((0, 1, 2), (1, 0, 2), (0, 1, 3), (0, 12), (1, 2), (0, -1, 2))]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert hashed_seed(3, 17, 5, 2) == 6863232919781483345  # the random numbers of every recorded run come from these


def test_a_suggestion_is_the_nearest_name_or_nothing() -> None:
    assert did_you_mean("trian", ["train", "evaluate"]) == " Did you mean 'train'?"
    assert did_you_mean("verfy", ["verify"], shown_as="judges:{}") == " Did you mean 'judges:verify'?"
    assert did_you_mean("xyzzy", ["train"]) == ""
    assert did_you_mean("trian", ["train"], similarity=0.9) == ""
    assert nearest_name("scor", iter(["answer", "score"])) == "score"


def test_a_file_has_its_name_only_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut takes is what was not synced: the content comes before the name, and the name is synced too."""
    path, order = tmp_path / "latest", []
    path.write_text("before")
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        order.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}"), path.read_text()))
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        order.append(("replace", str(source), path.read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    disk.write_text_whole(path, "after")
    unfinished = str(tmp_path / "latest.partial")
    assert order == [
        ("sync", unfinished, "before"),
        ("replace", unfinished, "before"),
        ("sync", str(tmp_path), "after"),
    ]
    assert [file.name for file in tmp_path.iterdir()] == ["latest"]


def test_a_child_ends_with_its_parent_even_where_that_has_ended_before() -> None:
    """The grandchild asks when its parent is gone already, so that the kernel would never signal it."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover - only pipes tell of it
        parent = os.getpid()
        if os.fork() == 0:
            os.close(read_end)
            while os.getppid() == parent:  # the condition under test; the parent leaves at once
                pass
            signal_when_parent_ends(signal.SIGKILL, parent)
            os.write(write_end, b"alive")
        os._exit(0)
    os.close(write_end)
    os.waitpid(child, 0)
    with os.fdopen(read_end, "rb") as answers:
        assert answers.read() == b""
