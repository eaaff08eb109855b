"""A job's shell text, run by bash with a small program in torchrun's place; tests/slurm has the real one."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.launch.job_script import batch_setup, node_script
from megatron_fipo.launch.settings import Settings
from megatron_fipo.system.exit_codes import EXIT_BAD_INPUT, EXIT_STOPPED

ROOT = Path(__file__).parents[2]
LAUNCHER = """#!/bin/bash
printf '%s\\n' "$@" > arguments
env > environment
trap 'echo launcher >> signals; exit 1' TERM
python3 -c '
import os, signal, sys, time
def leave(number, frame):
    open("signals", "a").write("rank\\n")
    sys.exit(3)
signal.signal(signal.SIGTERM, leave)
open("rank_is_ready", "w").close()
end = time.monotonic() + 60
while time.monotonic() < end and not os.path.exists("finish"):
    time.sleep(0.02)
sys.exit(int(open("finish").read()))
' &
wait $! || exit 1
"""
"""Like torchrun: it has handlers of its own, a rank below it, and exit status 1 whatever the rank's was."""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    path = tmp_path / "training environment" / "python"
    path.parent.mkdir()
    path.write_text(LAUNCHER)
    path.chmod(0o755)
    return path


def settings_with(python: Path, **more: Any) -> Settings:
    return Settings(nodes=2, gpus_per_node=None, processes_per_node=1, python=str(python), **more)


def start(command: Sequence[str | Path], folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a process in `folder`, in a process group of its own, as one node of job 123456."""
    surroundings = {**os.environ, "SLURM_JOB_ID": "123456", "FIPO_HEAD_ADDRESS": "10.0.0.7", **environment}
    surroundings["PYTHONPATH"] = str(ROOT)
    return subprocess.Popen(
        command, cwd=folder, env=surroundings, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def start_script(text: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    (folder / "script.sh").write_text(text)
    return start(["bash", "script.sh"], folder, **environment)


def start_launcher(launcher: Path, folder: Path) -> subprocess.Popen[str]:
    return start([sys.executable, "-m", "megatron_fipo.launch.node_process", launcher], folder)


def wait_until(is_true: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_torchrun_is_called_once_a_node_with_the_first_nodes_address(python: Path, tmp_path: Path) -> None:
    (tmp_path / "finish").write_text("0")
    script = node_script(settings_with(python), str(tmp_path), ["my run.yaml", "train.num_steps=5"])
    assert start_script(script, tmp_path, SLURM_RESTART_COUNT="2").wait(timeout=60) == 0
    assert (tmp_path / "arguments").read_text().split("\n") == [
        *("-m", "megatron_fipo.launch.node_process"),
        *(str(python), "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-id", "123456.2", "--rdzv-endpoint", "10.0.0.7:23456"),
        *("-m", "megatron_fipo.train", "my run.yaml", "train.num_steps=5", ""),
    ]


def test_one_machine_needs_no_address(python: Path, tmp_path: Path) -> None:
    script = node_script(settings_with(python, executor="local", rendezvous_port=1), str(tmp_path), ["run.yaml"])
    assert "-m torch.distributed.run --standalone --nproc-per-node 1 " in script
    assert "rdzv" not in script


@pytest.mark.parametrize(
    ("number", "reaches", "status"),
    [
        (signal.SIGUSR1, ["rank"], EXIT_STOPPED),  # the time limit: torchrun is not to know
        (signal.SIGTERM, ["launcher", "rank"], 1),  # scancel: nothing is to be queued again
    ],
)
def test_signals_to_all_processes(
    python: Path, tmp_path: Path, number: signal.Signals, reaches: list[str], status: int
) -> None:
    """Slurm signals every process of a step."""
    process = start_launcher(python, tmp_path)
    wait_until((tmp_path / "rank_is_ready").exists)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == status
    wait_until(lambda: sorted((tmp_path / "signals").read_text().split()) == reaches)


@pytest.mark.parametrize(("rank_status", "status"), [("0", 0), ("5", 1)])
def test_without_a_signal_the_status_is_torchruns(python: Path, tmp_path: Path, rank_status: str, status: int) -> None:
    (tmp_path / "finish").write_text(rank_status)
    assert start_launcher(python, tmp_path).wait(timeout=60) == status


def test_a_launcher_that_is_killed_has_the_shells_status(python: Path, tmp_path: Path) -> None:
    python.write_text("#!/bin/sh\nkill -KILL $$\n")
    assert start_launcher(python, tmp_path).wait(timeout=60) == 128 + signal.SIGKILL


def test_a_signal_before_there_are_ranks_ends_torchrun(python: Path, tmp_path: Path) -> None:
    python.write_text("#!/usr/bin/env python3\nimport time\nopen('is_up', 'w').close()\ntime.sleep(60)\n")
    process = start_launcher(python, tmp_path)
    wait_until((tmp_path / "is_up").exists)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.wait(timeout=60) == EXIT_STOPPED


def test_a_run_that_ends_well_after_the_signal_is_not_queued_again(python: Path, tmp_path: Path) -> None:
    python.write_text(LAUNCHER.replace("signal.SIGTERM, leave", "signal.SIGTERM, signal.SIG_IGN"))
    process = start_launcher(python, tmp_path)
    wait_until((tmp_path / "rank_is_ready").exists)
    os.killpg(process.pid, signal.SIGUSR1)
    assert process.stderr is not None
    assert "the time limit is near" in process.stderr.readline()
    (tmp_path / "finish").write_text("0")
    assert process.wait(timeout=60) == 0


def test_variables_arrive_as_they_were_written(python: Path, tmp_path: Path) -> None:
    (tmp_path / "finish").write_text("0")
    env = {"QUOTED": "a 'b' \"c\" $HOME `date`", "lower_case": "1"}
    process = start_script(node_script(settings_with(python, env=env), str(tmp_path), ["run.yaml"]), tmp_path)
    assert process.wait(timeout=60) == 0
    lines = (tmp_path / "environment").read_text().split("\n")
    assert {line for line in lines if line.partition("=")[0] in env} == {f"{k}={v}" for k, v in env.items()}


def test_a_secret_that_is_missing_is_named_before_anything_starts(python: Path, tmp_path: Path) -> None:
    script = node_script(settings_with(python, secrets=["FIRST", "SECOND"]), str(tmp_path), ["run.yaml"])
    process = start_script(script, tmp_path, FIRST="there")
    _, said = process.communicate(timeout=60)
    assert process.returncode == EXIT_BAD_INPUT
    assert "error: the environment variable SECOND is not set on" in said
    assert "there" not in said
    assert not (tmp_path / "arguments").exists()


def test_secrets_may_come_from_a_file_on_the_nodes(python: Path, tmp_path: Path) -> None:
    (tmp_path / "finish").write_text("0")
    (tmp_path / "my secrets").write_text("SECOND='two words'\n")
    settings = settings_with(python, secrets=["SECOND"], secrets_file=str(tmp_path / "my secrets"), setup=["umask 077"])
    script = node_script(settings, str(tmp_path), ["run.yaml"])
    assert "two words" not in script
    assert start_script(script, tmp_path).wait(timeout=60) == 0
    assert "SECOND=two words\n" in (tmp_path / "environment").read_text()
    assert (tmp_path / "environment").stat().st_mode & 0o077 == 0, "the setup line ran before torchrun"


@pytest.mark.parametrize(
    ("more", "status", "environment", "is_queued"),
    [
        ({}, EXIT_STOPPED, {}, True),
        ({}, EXIT_STOPPED, {"SLURM_RESTART_COUNT": "99"}, True),
        ({}, EXIT_STOPPED, {"SLURM_RESTART_COUNT": "100"}, False),
        ({"max_requeues": 1}, EXIT_STOPPED, {"SLURM_RESTART_COUNT": "1"}, False),
        ({"requeue": False}, EXIT_STOPPED, {}, False),
        ({}, 0, {}, False),
        ({}, 1, {}, False),
        ({}, 143, {}, False),
    ],
)
def test_only_a_saved_run_is_queued_again(
    tmp_path: Path, more: Mapping[str, Any], status: int, environment: Mapping[str, str], is_queued: bool
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(tmp_path / "called"))}\n')
    scontrol.chmod(0o755)
    script = "\n".join(["set -e", "head_node_ip='10.0.0.7 fe80::1'", batch_setup(Settings(**more)), f"exit {status}"])
    process = start_script(script, tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}", **environment)
    assert process.wait(timeout=60) == status
    assert (tmp_path / "called").exists() == is_queued
    if is_queued:
        assert (tmp_path / "called").read_text() == "requeue 123456\n"


def test_a_node_that_has_ended_is_not_taken_for_one_that_was_killed() -> None:
    """srun sends SIGTERM to all nodes once one is done: also at the moment when another one's process ends."""
    signals_to_its_end = "(while kill -TERM $PPID 2>/dev/null; do :; done) & exit 3"
    command = [sys.executable, "-m", "megatron_fipo.launch.node_process", "sh", "-c", signals_to_its_end]
    assert [subprocess.run(command, timeout=60, check=False).returncode for _ in range(3)] == [3, 3, 3]
