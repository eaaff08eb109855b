"""Names of checkpoints, which of them are trusted first, which stay, and how damage shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_fipo.checkpoint.folder import (
    begin,
    checkpoint_name,
    delete_old,
    describe_files,
    faults,
    file_names,
    latest_first,
    latest_name,
    publish,
    read_manifest,
    step_of,
    write_manifest,
)


def save(root: Path, name: str) -> None:
    partial, target = begin(root, name)
    (partial / "data").write_bytes(name.encode())
    publish(partial, target)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("step_*"))


def test_names_sort_as_time_passes() -> None:
    order = [checkpoint_name(1), checkpoint_name(1, 1), checkpoint_name(1, 12), checkpoint_name(2), checkpoint_name(10)]
    assert order == sorted(order)
    assert order[:2] == ["step_000001", "step_000001_update_0001"]
    assert [step_of(Path(name)) for name in order] == [1, 1, 1, 2, 10]


def test_the_one_that_latest_names_comes_first_then_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, checkpoint_name(step))
    assert [path.name for path in latest_first(tmp_path)] == ["step_000003", "step_000002", "step_000001"]
    (tmp_path / "latest").write_text("step_000002\n")  # killed after step 3 was whole, before latest moved
    assert [path.name for path in latest_first(tmp_path)] == ["step_000002", "step_000003", "step_000001"]
    (tmp_path / "step_000004.partial.abcd").mkdir()
    assert len(latest_first(tmp_path)) == 3


def test_what_latest_names_is_never_written_over(tmp_path: Path) -> None:
    save(tmp_path, "step_000001")
    for expected in ("step_000001.again", "step_000001", "step_000001.again"):
        before = latest_first(tmp_path)[0]
        partial, target = begin(tmp_path, "step_000001")
        assert before.is_dir()
        publish(partial, target)
        assert names(tmp_path) == [expected]


def test_a_save_begins_by_clearing_away_what_killed_runs_left(tmp_path: Path) -> None:
    left, _ = begin(tmp_path, "step_000001")
    partial, target = begin(tmp_path, "step_000001")
    assert left != partial, "a writer that outlived its run cannot write into the new folder"
    assert not left.exists()
    assert target == tmp_path / "step_000001"


def test_the_last_ones_and_every_tenth_stay(tmp_path: Path) -> None:
    for step in range(8, 22):
        save(tmp_path, checkpoint_name(step))
        delete_old(tmp_path, keep_last=2, keep_every=10)
    assert names(tmp_path) == ["step_000010", "step_000020", "step_000021"]
    save(tmp_path, checkpoint_name(21, 3))
    save(tmp_path, checkpoint_name(22))
    delete_old(tmp_path, keep_last=1, keep_every=10)
    assert names(tmp_path) == ["step_000010", "step_000020", "step_000022"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "step_000001"
    (folder / "huggingface").mkdir(parents=True)
    for name in ("weights.distcp", "huggingface/config.json"):
        (folder / name).write_bytes(b"some bytes of " + name.encode())
    write_manifest(folder, describe_files(folder, file_names(folder)))
    return folder


def all_faults(folder: Path) -> list[str]:
    files = read_manifest(folder)
    return faults(folder, sorted(files), files)


def test_a_whole_checkpoint_has_no_faults(checkpoint: Path) -> None:
    assert sorted(read_manifest(checkpoint)) == ["huggingface/config.json", "weights.distcp"]
    assert all_faults(checkpoint) == []


def test_damage_is_named(checkpoint: Path) -> None:
    weights = checkpoint / "weights.distcp"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    assert all_faults(checkpoint) == [f"weights.distcp has {len(whole) - 1} bytes instead of {len(whole)}"]
    weights.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert all_faults(checkpoint) == ["weights.distcp has changed since it was written (its CRC-32 differs)"]
    weights.unlink()
    assert all_faults(checkpoint) == ["weights.distcp is missing"]


def what_is_said(folder: Path) -> list[str]:
    """As a run asks: a manifest that cannot be used is one more fault."""
    try:
        return all_faults(folder)
    except ValueError as error:
        return [str(error)]


@pytest.fixture
def megatron(checkpoint: Path) -> Path:
    """With two files that a loader would read."""
    for number in (0, 1):
        (checkpoint / f"__{number}_0.distcp").write_bytes(b"tensors of rank %d" % number)
    write_manifest(checkpoint, describe_files(checkpoint, file_names(checkpoint)))
    return checkpoint


@pytest.mark.parametrize("is_old", [False, True], ids=["with its checksum", "as it was before"])
def test_any_flipped_bit_of_a_manifest_is_told_or_harmless(megatron: Path, is_old: bool) -> None:
    """Every bit of it: words, never another kind of error, and no file goes unchecked."""
    manifest = megatron / "manifest.json"
    if is_old:
        manifest.write_text(json.dumps({"files": json.loads(manifest.read_text())["files"]}, indent=1))
    whole, listed = manifest.read_bytes(), set(read_manifest(megatron))
    told = 0
    for place in range(len(whole)):
        for bit in range(8):
            manifest.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            if found := what_is_said(megatron):
                told += 1
                assert all(isinstance(line, str) and line for line in found)
            else:  # one space for another, or a letter of a file that no loader reads
                loaded = {name for name in listed if name.endswith(".distcp")}
                assert loaded <= set(read_manifest(megatron)), (place, bit)
    assert told > 0.7 * 8 * len(whole.replace(b" ", b"").replace(b"\n", b""))


def test_an_entry_that_becomes_another_is_noticed(megatron: Path) -> None:
    """A flipped bit made `__0_0` a second `__1_0`, and rank 0's file was not looked at any more."""
    manifest = megatron / "manifest.json"
    for text in (manifest.read_text(), json.dumps({"files": json.loads(manifest.read_text())["files"]})):
        manifest.write_text(text.replace("__0_0", "__1_0"))
        assert "an entry is there twice" in what_is_said(megatron)[0]


def test_an_entry_that_is_lost_with_its_file_is_noticed(megatron: Path) -> None:
    """Only the manifest's own checksum knows that there was one."""
    manifest = json.loads((megatron / "manifest.json").read_text())
    del manifest["files"]["__1_0.distcp"]
    (megatron / "__1_0.distcp").unlink()
    (megatron / "manifest.json").write_text(json.dumps(manifest))
    assert "has changed since it was written (its CRC-32 differs)" in what_is_said(megatron)[0]


def test_a_file_that_is_not_listed_is_noticed_if_it_would_be_loaded(megatron: Path) -> None:
    (megatron / "note.txt").write_text("a note of somebody's does no harm")
    assert what_is_said(megatron) == []
    (megatron / "__2_0.distcp").write_bytes(b"")
    assert what_is_said(megatron) == [f"{megatron / 'manifest.json'} does not list __2_0.distcp, which is there"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "null",
        "7",
        '{"files": []}',
        '{"files": {"a": []}}',
        '{"files": {"a": {"bytes": "1", "crc32": 2}}}',
        '{"files": {"a": {"bytes": true, "crc32": 2}}}',
        '{"files": {"a": {"bytes": -1, "crc32": 2}}}',
        '{"files": {"../a": {"bytes": 1, "crc32": 2}}}',
        '{"files": {"/etc/passwd": {"bytes": 1, "crc32": 2}}}',
        '{"files": {}, "crc32": null}',
        '{"files": {}, "crc33": 1}',
        "[" * 100_000,
    ],
)
def test_json_that_is_no_manifest_is_named(checkpoint: Path, text: str) -> None:
    (checkpoint / "manifest.json").write_text(text)
    assert what_is_said(checkpoint)[0].startswith(f"{checkpoint / 'manifest.json'} ")


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    for name in ("step_abc", "step_", "step_000001x", "steps", "step_000001_update_"):
        (tmp_path / name).mkdir()
    save(tmp_path, checkpoint_name(1))
    assert [path.name for path in latest_first(tmp_path)] == ["step_000001"]
    delete_old(tmp_path, keep_last=1, keep_every=0)
    assert (tmp_path / "step_abc").is_dir()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"step_000009\n", b"\x1b[31mred", b"", b"\0"])
def test_a_damaged_pointer_only_changes_the_order(tmp_path: Path, content: bytes) -> None:
    for step in (1, 2):
        save(tmp_path, checkpoint_name(step))
    (tmp_path / "latest").write_bytes(content)
    assert [path.name for path in latest_first(tmp_path)] == ["step_000002", "step_000001"]
    assert (latest_name(tmp_path) or "").isprintable()


def test_a_manifest_that_cannot_be_read_is_named(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read"):
        read_manifest(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        read_manifest(checkpoint)
    (checkpoint / "manifest.json").mkdir()
    with pytest.raises(ValueError, match=r"manifest\.json is no file"):
        read_manifest(checkpoint)
