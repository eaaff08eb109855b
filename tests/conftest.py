"""What holds for all tests: none of them asks the Hugging Face hub, whatever name a mistake makes of a path."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported, and for processes that tests start


def pytest_collection_finish() -> None:
    """All that was imported and collected stays: the garbage collector need not look through it again and again."""
    gc.freeze()
