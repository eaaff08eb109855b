"""Training from a notebook's cell: an event loop runs in the thread already, and the next cell trains again."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from megatron_fipo.evaluation.chat import Chat, ChatOptions
from megatron_fipo.parallel.local_ranks import run_local_ranks
from megatron_fipo.train import main
from tests.end_to_end.runs import QUICKSTART, ROOT, SHORT, SMALL

OVERRIDES = (*SMALL, *SHORT, "parallel.cp=1", "train.num_steps=1", "checkpoint.export_huggingface=true")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE")
"""Variables that whoever starts ranks sets, and a notebook has none of."""


async def _training_cell(folder: str) -> int:
    return main([QUICKSTART, *OVERRIDES, f"run.output_dir={folder}"])


async def _chat_cell(folder: str) -> str:
    return Chat(folder, ChatOptions(temperature=0.0, max_tokens=8)).answer("1+1=")


def _notebook(folder: str) -> str:
    """Train in two cells; what a third is answered."""
    for name in OF_A_RANK:
        del os.environ[name]
    os.chdir(ROOT)
    for number in range(2):
        code = asyncio.run(_training_cell(f"{folder}/{number}"))
        assert code == 0, code
    return asyncio.run(_chat_cell(f"{folder}/1/huggingface"))


def test_two_cells_train_and_a_third_talks(tmp_path: Path) -> None:
    assert run_local_ranks(_notebook, 1, str(tmp_path), preload=("tests.parallel.preload",), timeout_s=240)[0]
