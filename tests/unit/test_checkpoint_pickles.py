"""A checkpoint that would run code when it is opened runs none, whoever opens it."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from megatron_fipo.convert.checkpoint_pickles import check_pickles, read_metadata
from megatron_fipo.convert.offline.command import add_megatron_to_hf, add_verify, run
from megatron_fipo.convert.offline.to_megatron import plan_to_megatron
from megatron_fipo.convert.pickle_guard import UntrustedCheckpointError, unpickle
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


def in_the_state_of_fp8(dtype: torch.dtype) -> Callable[[Path, Path], None]:
    """As Transformer Engine stores it: a pickle in a tensor of bytes; it reads any other tensor's bytes as well."""

    def change(checkpoint: Path, marker: Path) -> None:
        put_state(checkpoint, {"recipe": Runs(marker)}, dtype)

    return change


def put_state(checkpoint: Path, state: Any, dtype: torch.dtype = torch.uint8) -> None:
    """Give one module of a checkpoint a state, pickled into a tensor."""
    metadata = FileSystemReader(checkpoint).read_metadata()
    stored = metadata.state_dict_metadata
    index = next(index for index in metadata.storage_data if isinstance(stored[index.fqn], BytesStorageMetadata))
    assert "_extra_state" in index.fqn
    pickled = bytearray(pickle.dumps(state))
    pickled += b"\0" * (-len(pickled) % dtype.itemsize)
    stream = io.BytesIO()
    torch.save([torch.frombuffer(pickled, dtype=dtype)], stream)
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
    "the state of FP8": in_the_state_of_fp8(torch.uint8),
    "the same in other numbers": in_the_state_of_fp8(torch.float32),
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


def safe_load_from_bytes(data: bytes) -> Any:
    """Stands for the function that Megatron-Core 0.19 puts in the place of torch's, whose name pickled tensors bear."""
    return torch.load(io.BytesIO(data), weights_only=True)


@pytest.mark.parametrize("loader", ["torch.storage", "megatron.core.safe_globals"])
def test_the_state_of_fp8_is_read(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loader: str) -> None:
    """As `get_extra_state` of Transformer Engine 2.10 pickles it; its recipes are looked at and not loaded."""
    if loader != "torch.storage":
        megatrons = ModuleType(loader)
        function = FunctionType(safe_load_from_bytes.__code__, globals(), "safe_load_from_bytes")
        function.__module__, function.__qualname__ = loader, function.__name__
        megatrons.safe_load_from_bytes = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, loader, megatrons)
        monkeypatch.setattr(torch.storage, "_load_from_bytes", function)
    module = ModuleType("transformer_engine.common.recipe")

    class Format(Enum):
        HYBRID = namedtuple("_FormatHelper", ["max_fwd", "max_bwd"])(448.0, 57344.0)

    @dataclass
    class DelayedScaling:
        fp8_format: Any = Format.HYBRID
        margin: int = 0

    for recipe in (Format, DelayedScaling, type(Format.HYBRID.value)):
        recipe.__module__, recipe.__qualname__ = module.__name__, recipe.__name__
        setattr(module, recipe.__name__, recipe)
    state = {
        "recipe": DelayedScaling(),
        "scale_fwd": torch.ones(3),
        "amax_history_fwd": torch.zeros(1024, 3),
        "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1, "fp8_max_fwd": 448.0, "names": ("a", [1])},
    }
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    for name in ("transformer_engine", "transformer_engine.common", module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    put_state(checkpoint, state)
    monkeypatch.undo()
    check_pickles(checkpoint)


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


def test_a_missing_common_file_is_named(folders: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(folders / "megatron", tmp_path / "megatron")
    (checkpoint / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"common\.pt is not there"):
        check_pickles(checkpoint)
    # Megatron-Core 0.19 keeps it between the tensors; the parallel suite reads what that version really writes.
    metadata = FileSystemReader(checkpoint).read_metadata()
    metadata.state_dict_metadata["common_state/shard_0_1"] = BytesStorageMetadata()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
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


def test_classes_stay_as_they_are(tmp_path: Path) -> None:
    """A pickle's BUILD sets attributes of whatever lies below it, a class too."""
    named = b"\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08Metadata\x93"
    state = b"N}(\x8c\x07planted\x8c\x01x\x8c\x07__doc__\x8c\x01xu\x86"
    said = Metadata.__doc__
    with pytest.raises(UntrustedCheckpointError, match=r"names a change of torch\..*\.Metadata"):
        unpickle(b"\x80\x04" + named + state + b"b.", tmp_path)
    assert not hasattr(Metadata, "planted")
    assert Metadata.__doc__ == said
    assert pickle.loads(b"\x80\x04" + named + state + b"b.") is Metadata
    assert Metadata.planted == "x", "it is the check that keeps it away"
    del Metadata.planted
    Metadata.__doc__ = said
