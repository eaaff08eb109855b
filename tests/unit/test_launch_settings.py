"""Settings of a submission: what is read, and what is refused and why."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import ConfigError
from megatron_fipo.launch.settings import Settings, SshSettings, load_settings, seconds_of


def settings_of(tmp_path: Path, text: str, **flags: Any) -> Settings:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return load_settings(file, flags)


def test_a_file_gives_types_and_flags_overrule_it(tmp_path: Path) -> None:
    text = """
nodes: 4
gpus_per_node: 8
time: 12:00:00
exclusive: false
account: null
container_mounts: ["/data:/data:ro", "/scratch:/scratch"]
container_image: nvcr.io/nvidia/pytorch:26.01-py3
env: {NCCL_DEBUG: WARN, NCCL_IB_DISABLE: 0, SWITCH: on}
ssh: {host: login, user: me, port: 2222}
project_dir: /home/me/megatron_fipo
job_dir: /scratch/jobs
sbatch: {reservation: week12}
"""
    settings = settings_of(tmp_path, text, nodes=16, partition="batch", qos=None)
    assert (settings.nodes, settings.partition, settings.qos, settings.account) == (16, "batch", None, None)
    assert settings.time == "12:00:00", "and not the 43200 that YAML 1.1 takes it for"
    assert settings.exclusive is False
    assert settings.env == {"NCCL_DEBUG": "WARN", "NCCL_IB_DISABLE": "0", "SWITCH": "on"}
    assert settings.container_mounts == ["/data:/data:ro", "/scratch:/scratch"]
    assert (settings.ssh.host, settings.ssh.port) == ("login", 2222)
    assert settings.sbatch == {"reservation": "week12"}
    assert (settings.ranks_per_node, settings.world_size) == (8, 128)


def test_ranks_need_not_be_gpus(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "{nodes: 2, gpus_per_node: null, processes_per_node: 1}")
    assert settings.gpus_per_node is None
    assert settings.world_size == 2


@pytest.mark.parametrize(
    ("time_limit", "seconds"),
    [
        ("30", 30 * 60),
        ("30:15", 30 * 60 + 15),
        ("04:00:00", 4 * 3600),
        ("2-12", 60 * 3600),
        ("2-12:30", 60 * 3600 + 30 * 60),
        ("1-00:00:05", 24 * 3600 + 5),
        ("4h", None),
        ("1:2:3:4", None),
        ("-5", None),
        ("", None),
    ],
)
def test_time_limits_are_slurms(time_limit: str, seconds: int | None) -> None:
    assert seconds_of(time_limit) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node: 2", r"unknown key node in .*cluster\.yaml\. Did you mean nodes\?"),
        ("ssh: {hots: login}", r"unknown key ssh\.hots .*Did you mean ssh\.host\?"),
        ("nodes: two", r"nodes='two' in .*cluster\.yaml: .*[Ii]nteger"),
        ("executor: slrum", r"executor=slrum: must be one of slurm, local\. Did you mean slurm\?"),
        ("nodes: 0", r"nodes=0: must be at least 1\."),
        ("gpus_per_node: 0", r"gpus_per_node=0: must be at least 1\. Use null where Slurm hands out no GPUs\."),
        ("gpus_per_node: null", r"gpus_per_node=null needs processes_per_node"),
        ("time: 4h", r"time=4h: not a time limit in Slurm's format"),
        ("time: 10", r"signal_before_end_s=600: Slurm may send it 60 s earlier still, and time=10 is 600 s"),
        ("signal_before_end_s: 70000", r"signal_before_end_s=70000: Slurm takes 1 to 65535"),
        ("container_mounts: ['/data:/data']", r"container_mounts without container_image"),
        ("{container_image: i, container_mounts: [/data]}", r"/data is not of the form SOURCE:TARGET"),
        ("sbatch: {signal: 'B:TERM@5'}", r"sbatch\.signal: set signal_before_end_s instead\."),
        ("sbatch: {ntasks-per-node: 8}", r"sbatch\.ntasks-per-node: set processes_per_node instead\."),
        ("ssh: {host: login, user: me}", r"(?s)project_dir=None: with ssh\.host.*job_dir=None"),
        ("{ssh: {host: login}, project_dir: /p, job_dir: /j}", r"ssh\.host=login needs ssh\.user"),
        ("env: {WANDB_API_KEY: abc}", r"env\.WANDB_API_KEY looks like a secret.*below secrets"),
        ("env: {hf_token: abc}", r"env\.hf_token looks like a secret"),
        ("env: {DB_PASS: abc}", r"env\.DB_PASS looks like a secret"),
        ("env: {MY_PWD: abc}", r"env\.MY_PWD looks like a secret"),
        (
            "secrets: ['WANDB_API_KEY=abc']",
            r"secrets: entry 1 is no name of an environment variable\. Only names belong here",
        ),
        ("{env: {A: 1}, secrets: [A]}", r"A stands below env and below secrets"),
        ("{executor: local, nodes: 2}", r"nodes: executor=local runs on this machine"),
        ("[nodes]", r"must hold keys"),
        ("nodes: [", r"is not valid YAML"),
    ],
)
def test_what_cannot_be_is_refused_with_its_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_of(tmp_path, text)


def test_a_secrets_value_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        settings_of(tmp_path, "{env: {HF_TOKEN: hf_5f0c}, secrets: ['X=hf_77aa']}")
    assert "hf_5f0c" not in str(refused.value)
    assert "hf_77aa" not in str(refused.value)


def test_the_interpreter_is_that_of_the_installation_beside_the_project(tmp_path: Path) -> None:
    assert Settings().interpreter(str(tmp_path)) == "python"
    installed = tmp_path / ".venv" / "bin" / "python"
    installed.parent.mkdir(parents=True)
    installed.symlink_to(sys.executable)
    assert Settings().interpreter(str(tmp_path)) == str(installed)
    assert Settings(python="/opt/python").interpreter(str(tmp_path)) == "/opt/python"
    # This machine's folder says nothing about a container's, or about another machine's.
    assert Settings(container_image="image").interpreter(str(tmp_path)) == "python"
    assert Settings(ssh=SshSettings(host="login")).interpreter(str(tmp_path)) == "python"


def test_text_is_kept_as_written(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "{account: 007, qos: 1e3, env: {A: 1.10, B: true, C: ''}, time: 30}")
    assert (settings.account, settings.qos, settings.time) == ("007", "1e3", "30")
    assert settings.env == {"A": "1.10", "B": "true", "C": ""}
