"""What the start of a rank or a command leaves behind: a collector that works, and a compiler that is torch's own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

AS_A_PROGRAM = """
import gc, runpy, sys, torch
compiler = torch.compile
sys.argv = ["megatron_fipo.train", "--help"]
try:
    runpy.run_module("megatron_fipo.train", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print(gc.isenabled(), gc.get_freeze_count() > 100_000, torch.compile is compiler)
"""
AS_A_COMMAND = """
import gc, runpy, sys, torch
compiler = torch.compile
sys.argv = ["megatron_fipo.cli", "chat", "/nowhere", "--prompt", "1+2="]
try:
    runpy.run_module("megatron_fipo.cli", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 2, end.code
print(gc.isenabled(), gc.get_freeze_count() > 100_000, torch.compile is compiler)
"""
AS_A_MODULE = """
import gc, torch
compiler = torch.compile
import megatron_fipo.train
from megatron_fipo.cli import main
assert main(["chat", "/nowhere", "--prompt", "1+2="]) == 2
print(gc.isenabled(), gc.get_freeze_count() > 0, torch.compile is compiler)
"""


@pytest.mark.parametrize(
    ("program", "left"),
    [
        pytest.param(AS_A_PROGRAM, "True True True", id="a process of ours freezes its imports"),
        pytest.param(AS_A_COMMAND, "True True True", id="a command freezes its imports"),
        pytest.param(AS_A_MODULE, "True False True", id="a notebook's garbage stays garbage"),
    ],
)
def test_what_a_start_leaves_behind(program: str, left: str) -> None:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.splitlines()[-1] == left
