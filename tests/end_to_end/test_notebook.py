"""Training from a notebook's cell: an event loop runs in the thread already, and the next cell trains again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.runs import QUICKSTART, ROOT, SHORT, SMALL

CELLS = """
import asyncio, sys
from megatron_fipo.train import main
from megatron_fipo.evaluation.chat import Chat, ChatOptions

async def cell(arguments):
    return main(arguments)

async def chat_cell(folder):
    return Chat(folder, ChatOptions(temperature=0.0, max_tokens=8)).answer("1+1=")

folder, *arguments = sys.argv[1:]
for number in range(2):
    code = asyncio.run(cell([*arguments, f"run.output_dir={folder}/{number}"]))
    assert code == 0, code
assert asyncio.run(chat_cell(f"{folder}/1/huggingface"))
print("both cells ran")
"""


def test_two_cells_train_and_a_third_talks(tmp_path: Path) -> None:
    overrides = (*SMALL, *SHORT, "parallel.cp=1", "train.num_steps=1", "checkpoint.export_huggingface=true")
    result = subprocess.run(
        [sys.executable, "-c", CELLS, str(tmp_path), QUICKSTART, *overrides],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "both cells ran" in result.stdout
