"""What holds for all tests: none of them asks the Hugging Face hub, whatever name a mistake makes of a path."""

from __future__ import annotations

import gc
import os

import pytest

gc.disable()  # until all is collected: nothing of what is imported is garbage
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, and for processes that tests start


def pytest_configure(config: pytest.Config) -> None:
    """A process that has others collect and run the tests collects none."""
    if getattr(config.option, "numprocesses", None):
        gc.enable()


def pytest_collection_finish() -> None:
    """All that was imported and collected stays: the garbage collector need not look through it again and again."""
    gc.freeze()
    gc.enable()
