"""`megatron-fipo submit` with executor=local: NeMo-Run and torchrun on this machine, without Slurm."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.end_to_end.runs import QUICKSTART, ROOT, SMALL, latest_checkpoint_name, step_lines

pytestmark = pytest.mark.slurm

TIMEOUT_S = 240.0


def start(python: str, folder: Path, *overrides: str) -> subprocess.Popen[str]:
    settings = folder / "cluster.yaml"
    settings.write_text(
        f"{{executor: local, gpus_per_node: null, processes_per_node: 2, job_dir: {folder}/jobs, "
        f"python: {sys.executable}, env: {{OMP_NUM_THREADS: 1}}}}"
    )
    command = [python, "-m", "megatron_fipo.cli", "submit", QUICKSTART, *SMALL, f"run.output_dir={folder}/run"]
    return subprocess.Popen(
        [*command, *overrides, "--cluster", str(settings)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_run_that_fails_says_so(nemo_run_python: str, tmp_path: Path) -> None:
    process = start(nemo_run_python, tmp_path, "model.path=/nowhere")
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    assert "model.path=/nowhere" in output
    assert f"logs: {tmp_path}/jobs/experiments/quickstart/" in output


def test_ctrl_c_saves(nemo_run_python: str, tmp_path: Path) -> None:
    process, run = start(nemo_run_python, tmp_path, "train.num_steps=100000"), tmp_path / "run"
    try:
        end = time.monotonic() + TIMEOUT_S
        while not ((run / "metrics.jsonl").exists() and step_lines(run)):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < end
            time.sleep(0.2)
    finally:
        process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 1, output
    assert "stopped by a signal" in output
    assert int(latest_checkpoint_name(run).split("_")[1]) == len(step_lines(run))
