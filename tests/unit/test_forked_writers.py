"""Forked processes end with a parent that is killed, and so does what they forked."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PARENT = """
import multiprocessing, os, signal, sys, time
from contextlib import nullcontext
from megatron_fipo.checkpoint.forked_writers import ended_with_their_parent

fork = multiprocessing.get_context("fork")

def writer(pids):
    pids.put(os.getpid())
    time.sleep(60)

def writer_of_writers(pids):
    fork.Process(target=writer, args=(pids,)).start()
    writer(pids)

with ended_with_their_parent() if sys.argv[1] == "tied" else nullcontext():
    pids = fork.SimpleQueue()
    fork.Process(target=writer_of_writers, args=(pids,)).start()
print(pids.get(), pids.get(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux kills a process with its parent")
@pytest.mark.parametrize("how", ["tied", "left alone"])
def test_forked_processes_end_with_a_killed_parent(how: str, tmp_path: Path) -> None:
    script, output = tmp_path / "parent.py", tmp_path / "pids.txt"
    script.write_text(PARENT)
    with output.open("w") as file:  # not a pipe: those who are left would keep it open
        command = [sys.executable, str(script), how]
        status = subprocess.run(command, stdout=file, check=False, timeout=60).returncode
    assert status == -9
    pids = [int(pid) for pid in output.read_text().split()]
    assert len(set(pids)) == 2
    try:
        if how == "tied":
            deadline = time.monotonic() + 10
            while left := [pid for pid in pids if is_running(pid)]:
                assert time.monotonic() < deadline, f"still running: {left}"
                time.sleep(0.02)
        else:
            time.sleep(0.5)
            assert all(map(is_running, pids)), "without it both go on"
    finally:
        for pid in filter(is_running, pids):
            psutil.Process(pid).kill()


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
