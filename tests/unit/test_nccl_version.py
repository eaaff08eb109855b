"""NCCL of the trainer and of the servers, asked of their interpreters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.servers.nccl_version import check_same_nccl, nccl_of


def interpreter(folder: Path, name: str, answer: str) -> str:
    """A program that answers as a Python with torch does."""
    path = folder / name
    path.write_text(f"#!/bin/sh\necho 'a warning at import'\necho '{answer}'\n")
    path.chmod(0o755)
    return str(path)


def test_versions_that_differ_are_named_with_their_places(tmp_path: Path) -> None:
    ours = interpreter(tmp_path, "ours", '["2.13.0", 22907]')
    theirs = interpreter(tmp_path, "theirs", '["2.14.1", 23010]')
    assert nccl_of(ours) == ("2.13.0", 22907)
    check_same_nccl(ours, ours)
    words = rf"trainer's is 2\.29\.7 \(torch 2\.13\.0, {ours}\), the servers' is 2\.30\.10 \(torch 2\.14\.1, {theirs}\)"
    with pytest.raises(ServerError, match=words):
        check_same_nccl(ours, theirs)


def test_an_interpreter_without_nccl_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match=r"/no/python could not be asked for its NCCL's version"):
        nccl_of("/no/python")
    if not torch.cuda.is_available():
        with pytest.raises(ServerError, match=rf"{sys.executable} has no NCCL beside its torch: OSError: libnccl"):
            nccl_of(sys.executable)
