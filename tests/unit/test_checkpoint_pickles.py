"""A checkpoint that would run code when it is opened runs none, whoever opens it."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from megatron_fipo.convert.checkpoint_pickles import UntrustedCheckpointError, check_pickles, read_metadata, unpickle
from megatron_fipo.convert.command import add_megatron_to_hf, add_verify, run
from megatron_fipo.convert.to_megatron import plan_to_megatron
from tests.models import save_random_model


class Runs:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/ and megatron/, which was written by torch's own writer."""
    root = tmp_path_factory.mktemp("folders")
    plan_to_megatron(save_random_model(root / "hf", "llama"), root / "megatron").write(lambda _: None)
    return root


def in_metadata(place: str) -> Callable[[Path, Path], None]:
    def change(checkpoint: Path, marker: Path) -> None:
        metadata: Any = FileSystemReader(checkpoint).read_metadata()
        if place == "an object":
            metadata = Runs(marker)
        elif place == "a tensor's entry":
            metadata.state_dict_metadata[next(iter(metadata.state_dict_metadata))] = Runs(marker)
        else:
            setattr(metadata, place, Runs(marker))
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))

    return change


def in_an_extra_state(checkpoint: Path, marker: Path) -> None:
    """Between the tensors of a .distcp file, where torch's planner would unpickle it."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    stored = metadata.state_dict_metadata
    index = next(index for index in metadata.storage_data if isinstance(stored[index.fqn], BytesStorageMetadata))
    stream = io.BytesIO()
    torch.save([Runs(marker)], stream)
    (checkpoint / "more.distcp").write_bytes(stream.getvalue())
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "more.distcp", 0, len(stream.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_the_state_of_fp8(checkpoint: Path, marker: Path) -> None:
    """As Transformer Engine stores it: a pickle in a tensor of bytes."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    stored = metadata.state_dict_metadata
    index = next(index for index in metadata.storage_data if isinstance(stored[index.fqn], BytesStorageMetadata))
    stream = io.BytesIO()
    torch.save([torch.frombuffer(bytearray(pickle.dumps({"recipe": Runs(marker)})), dtype=torch.uint8)], stream)
    (checkpoint / "more.distcp").write_bytes(stream.getvalue())
    info = metadata.storage_data[index]
    info.relative_path, info.offset, info.length = "more.distcp", 0, len(stream.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(checkpoint: Path, marker: Path) -> None:
    torch.save({"loop": Runs(marker)}, checkpoint / "common.pt")


OF_METADATA = ("storage_meta", "planner_data", "an object", "a tensor's entry")
HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    **{place: in_metadata(place) for place in OF_METADATA},
    "an extra state": in_an_extra_state,
    "the state of FP8": in_the_state_of_fp8,
    "common.pt": in_common,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_runs(folders: Path, tmp_path: Path, name: str) -> None:
    checkpoint, marker = shutil.copytree(folders / "megatron", tmp_path / "megatron"), tmp_path / "it-ran"
    check_pickles(checkpoint)
    HOSTILE[name](checkpoint, marker)
    with pytest.raises(UntrustedCheckpointError, match="Only open checkpoints that you would run") as caught:
        check_pickles(checkpoint)
    assert "posix.mkdir" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("name", OF_METADATA)
def test_converting_and_verifying_run_nothing(
    folders: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint, marker = shutil.copytree(folders / "megatron", tmp_path / "megatron"), tmp_path / "it-ran"
    HOSTILE[name](checkpoint, marker)
    assert run(add_megatron_to_hf, [str(checkpoint), str(tmp_path / "back")]) == 2
    assert run(add_verify, [str(folders / "hf"), str(checkpoint)]) == 1
    said = capfd.readouterr().err
    assert said.count("names posix.mkdir, which no checkpoint of this project or of Megatron-Core does") == 2
    assert not marker.exists()


def test_what_torch_and_megatron_would_do_with_it(folders: Path, tmp_path: Path) -> None:
    """The marker can appear: it is the check that keeps it away."""
    checkpoint, marker = shutil.copytree(folders / "megatron", tmp_path / "megatron"), tmp_path / "it-ran"
    HOSTILE["storage_meta"](checkpoint, marker)
    FileSystemReader(checkpoint).read_metadata()
    assert marker.is_dir()


def test_what_torch_writes_is_read(folders: Path) -> None:
    ours, theirs = read_metadata(folders / "megatron"), FileSystemReader(folders / "megatron").read_metadata()
    assert theirs.storage_meta is not None
    theirs.storage_meta.load_id = None  # which the reader draws anew each time
    assert ours == theirs


def test_a_file_outside_the_checkpoint_is_not_read(folders: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    metadata = FileSystemReader(checkpoint).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = "../secret"
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UntrustedCheckpointError, match=r"the file '\.\./secret' outside the checkpoint"):
        read_metadata(checkpoint)


def test_another_format_is_refused(folders: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    for text, words in (
        ('{"sharded_backend": "zarr"}', "format 'zarr'"),
        ("[]", "does not say"),
        ("{", "does not say"),
    ):
        (checkpoint / "metadata.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            check_pickles(checkpoint)


def test_a_damaged_description_is_told_in_words(folders: Path, tmp_path: Path) -> None:
    """Each of a few hundred flipped bytes and cuts: refused in words, or read as something of the same form."""
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    file = checkpoint / ".metadata"
    whole = file.read_bytes()
    refused = 0
    for place in range(0, len(whole), max(len(whole) // 300, 1)):
        for damaged in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x21]) + whole[place + 1 :]):
            file.write_bytes(damaged)
            try:
                read_metadata(checkpoint)
            except ValueError as error:
                refused += str(checkpoint) in str(error)
    assert refused > 300


@pytest.mark.parametrize("value", [[], {"a": 1}, None, "text", torch.Size([1])])
def test_a_description_of_something_else_is_refused(folders: Path, tmp_path: Path, value: Any) -> None:
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(value))
    with pytest.raises(ValueError, match="is no description of a checkpoint"):
        read_metadata(checkpoint)


def test_names_behind_an_allowed_one_are_not_reached(tmp_path: Path) -> None:
    """Pickle's newer protocols follow dots: `Metadata.__init__.__globals__` would be a way out."""
    dotted = b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x8c\x1bMetadata.__init__.__globals__\x93."
    dotted = dotted.replace(b"\x8c\x29", b"\x8c" + bytes([len("torch.distributed.checkpoint.metadata")]))
    dotted = dotted.replace(b"\x8c\x1b", b"\x8c" + bytes([len("Metadata.__init__.__globals__")]))
    with pytest.raises(UntrustedCheckpointError, match=r"Metadata\.__init__\.__globals__"):
        unpickle(dotted, tmp_path)
    with pytest.raises(UntrustedCheckpointError, match=r"torch\.load"):
        unpickle(b"\x80\x04\x8c\x05torch\x8c\x04load\x93.", tmp_path)
    assert unpickle(pickle.dumps(torch.bfloat16), tmp_path) is torch.bfloat16
