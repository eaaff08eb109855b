"""The text that NeMo-Run makes of a job's settings; Slurm itself is not needed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
SETTINGS = """
nodes: 16
gpus_per_node: 8
cpus_per_node: 96
memory: 900G
account: my_account
partition: batch
qos: high
time: 1-00:00:00
python: /opt/venv/bin/python
container_image: /images/fipo.sqsh
container_mounts: ["/data:/data:ro"]
ssh: {host: login.invalid, user: me}
project_dir: /lustre/me/megatron-fipo
job_dir: /lustre/me/jobs
secrets: [WANDB_API_KEY]
sbatch: {reservation: week12, mail-type: FAIL}
"""


def dry_run(python: str, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "HOME": str(folder), "WANDB_API_KEY": "a-secret-value"}
    result = subprocess.run(
        [python, "-m", "megatron_fipo.cli", "submit", *arguments, "--dry-run"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "a-secret-value" not in result.stdout + result.stderr
    return result.stdout


def test_a_cluster_with_containers_behind_ssh(nemo_run_python: str, tmp_path: Path) -> None:
    """Also that a dry run connects to nothing: there is no such host."""
    file = tmp_path / "cluster.yaml"
    file.write_text(SETTINGS)
    recipe = "examples/qwen2_5_32b/fipo.yaml"
    text = dry_run(nemo_run_python, tmp_path, recipe, "--cluster", str(file), "--partition", "long")
    options = sorted(line.removeprefix("#SBATCH --") for line in text.split("\n") if line.startswith("#SBATCH"))
    output = options.pop(next(i for i, option in enumerate(options) if option.startswith("output=")))
    assert output.startswith("output=/lustre/me/jobs/experiments/qwen2_5_32b_fipo/")
    assert options == [
        "account=my_account",
        "cpus-per-task=96",
        "exclusive",
        "gpus-per-node=8",
        "job-name=megatron-fipo.qwen2_5_32b_fipo",
        "mail-type=FAIL",
        "mem=900G",
        "nodes=16",
        "ntasks-per-node=1",
        "open-mode=append",
        "partition=long",
        "qos=high",
        "reservation=week12",
        "signal=USR1@600",
        "time=1-00:00:00",
    ]
    srun = next(line for line in text.split("\n") if line.startswith("srun --output"))
    assert " --container-image /images/fipo.sqsh " in srun
    assert (
        "--container-mounts /data:/data:ro,/lustre/me/megatron-fipo:/lustre/me/megatron-fipo,/lustre/me/jobs/" in srun
    )
    assert " --container-env WANDB_API_KEY " in srun
    assert " --cpus-per-task=96 " in srun
    assert srun.endswith(" bash /nemo_run/scripts/qwen2_5_32b_fipo.sh")
    assert 'scontrol requeue "$SLURM_JOB_ID"' in text
    assert "/opt/venv/bin/python -m torch.distributed.run --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d" in text


def test_the_example_without_containers(nemo_run_python: str, tmp_path: Path) -> None:
    command = [nemo_run_python, "examples/qwen2_5_32b/submit.py", "--recipe", "dapo", "--account", "mine", "--dry-run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "#SBATCH --account=mine\n" in result.stdout
    assert "container" not in result.stdout
    assert f"cd {ROOT} || exit 2\n" in result.stdout
    assert f"-m megatron_fipo.train {ROOT}/examples/qwen2_5_32b/dapo.yaml\n" in result.stdout
