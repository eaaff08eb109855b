"""What the start of a rank or a command leaves behind: a collector that works, and the library's own functions."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

AS_A_PROGRAM = """
import functools, gc, runpy, sys, torch
compiler, cache = torch.compile, functools.lru_cache
sys.argv = ["megatron_fipo.train", "--help"]
try:
    runpy.run_module("megatron_fipo.train", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
print(gc.isenabled(), gc.get_freeze_count() > 100_000, torch.compile is compiler, functools.lru_cache is cache)
"""
AS_A_COMMAND = """
import functools, gc, runpy, sys, torch
compiler, cache = torch.compile, functools.lru_cache
sys.argv = ["megatron_fipo.cli", "chat", "/nowhere", "--prompt", "1+2="]
try:
    runpy.run_module("megatron_fipo.cli", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert end.code == 2, end.code
print(gc.isenabled(), gc.get_freeze_count() > 100_000, torch.compile is compiler, functools.lru_cache is cache)
"""
AS_A_MODULE = """
import functools, gc, torch
compiler, cache = torch.compile, functools.lru_cache
import megatron_fipo.train
from megatron_fipo.cli import main
assert main(["chat", "/nowhere", "--prompt", "1+2="]) == 2
print(gc.isenabled(), gc.get_freeze_count() > 0, torch.compile is compiler, functools.lru_cache is cache)
"""


@pytest.mark.parametrize(
    ("program", "left"),
    [
        pytest.param(AS_A_PROGRAM, "True True True True", id="a process of ours freezes its imports"),
        pytest.param(AS_A_COMMAND, "True True True True", id="a command freezes its imports"),
        pytest.param(AS_A_MODULE, "True False True True", id="a notebook's garbage stays garbage"),
    ],
)
def test_what_a_start_leaves_behind(program: str, left: str) -> None:
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.splitlines()[-1] == left


SCANS = """
import transformers_imported_first
import transformers.models
from transformers.utils import import_utils
scans = import_utils.create_import_structure_from_path.cache_info()
print(scans.misses > 100, scans.misses == scans.currsize)
"""


@pytest.mark.parametrize(("first", "once"), [("megatron_fipo.quiet", True), ("transformers", False)])
def test_transformers_reads_each_folder_of_its_models_once(first: str, once: bool) -> None:
    """It does not by itself: where it does one day, `system.scanned_once` can go."""
    program = SCANS.replace("transformers_imported_first", first)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split() == ["True", str(once)]
