"""The run that others are compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.runs import train

STRAIGHT_STEPS = 4


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of four steps that nothing interrupts: two ranks, context parallelism 2."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    train(folder, f"train.num_steps={STRAIGHT_STEPS}", "checkpoint.export_huggingface=true", expected=0)
    return folder
