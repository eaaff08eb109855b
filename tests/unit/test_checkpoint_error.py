"""What is said of a checkpoint that could not be written: a full disk and a dead rank are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import DistBackendError
from torch.distributed.checkpoint import CheckpointException

from megatron_fipo.checkpoint.error import could_not_read, could_not_write

CLOSED = "[../third_party/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:43210"
ZIP = "[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"


def _failed(*errors: Exception) -> CheckpointException:
    return CheckpointException("write", {rank: (error, None) for rank, error in enumerate(errors)})  # type: ignore


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CLOSED),
        RuntimeError("[Rank 0] Timed out waiting 1800000ms for recv operation to complete"),
        DistBackendError("NCCL error: remote process exited or there was a network error"),
        ConnectionResetError(104, "Connection reset by peer"),
        BrokenPipeError(32, "Broken pipe"),
        EOFError(),
    ],
)
def test_a_dead_rank_is_no_full_disk(tmp_path: Path, error: Exception) -> None:
    message = str(could_not_write(tmp_path / "step_000001", error))
    assert "another rank or its writer died or fell silent" in message
    assert "Make room" not in message
    assert "free there" not in message
    assert "start the same command again" in message


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        PermissionError(13, "Permission denied"),
        RuntimeError(ZIP),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 19968 vs 19862"),
        RuntimeError("<class 'OSError'>"),
        _failed(OSError(28, "No space left on device"), RuntimeError(CLOSED)),
        _failed(),
    ],
)
def test_a_disk_is_one(tmp_path: Path, error: Exception) -> None:
    message = str(could_not_write(tmp_path / "step_000001", error))
    assert "Make room or mend the folder's permissions" in message
    assert "GiB are free there" in message
    assert "died" not in message


def test_what_is_neither_is_told_as_it_is(tmp_path: Path) -> None:
    message = str(could_not_write(tmp_path / "step_000001", RuntimeError("dictionary changed size")))
    assert "could not be written: dictionary changed size. Earlier checkpoints" in message
    assert "Make room" not in message
    assert "died" not in message


def test_what_cannot_be_read_names_each_reason_once() -> None:
    mismatch = AssertionError("mismatch sizes torch.Size([128, 128]) vs\ntorch.Size([1, 128, 128])")
    said = str(could_not_read(Path("run/checkpoints/step_000003"), _failed(mismatch, mismatch, EOFError("cut short"))))
    assert said.startswith("run/checkpoints/step_000003 cannot be read")
    assert said.count("mismatch sizes torch.Size([128, 128]) vs torch.Size([1, 128, 128])") == 1
    assert "cut short" in said
    assert "Traceback" not in said
    assert "Restore it from a copy, or delete it to go on from the one before." in said
