"""Where and how a run is submitted: a small YAML file beside the run's configuration, and flags that overrule it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_fipo.config import ConfigError, looks_secret, read_text
from megatron_fipo.config.errors import choice_problem
from megatron_fipo.config.keys import key_problems, look_up
from megatron_fipo.config.yaml_values import read_yaml

EXECUTORS = ("slurm", "local")
SLURM_LEAD_S = 60
"""Slurm may deliver the signal up to this many seconds early."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SET_ELSEWHERE = {
    "account": "account",
    "error": "job_dir",
    "gpus_per_node": "gpus_per_node",
    "job_name": "the configuration's run.name",
    "nodes": "nodes",
    "ntasks": "nodes",
    "ntasks_per_node": "processes_per_node",
    "output": "job_dir",
    "partition": "partition",
    "qos": "qos",
    "signal": "signal_before_end_s",
    "time": "time",
}
"""Options of sbatch that may not be given below `sbatch`, each with the setting to use instead."""


@dataclass(frozen=True)
class SshSettings:
    """The cluster's login node, for those who submit from elsewhere. ssh authenticates by keys, agent, or prompt."""

    host: str = ""
    """Empty: sbatch is called on this machine."""
    user: str = ""
    port: Optional[int] = None
    identity: Optional[str] = None
    """Private key file on this machine."""


@dataclass(frozen=True)
class Settings:
    """All that a submission needs to know besides the run's configuration."""

    executor: str = "slurm"
    """slurm, or local: torchrun on this machine."""
    nodes: int = 1
    gpus_per_node: Optional[int] = 8
    """GPUs of each node to ask of Slurm; null asks for none (nodes without GPUs, clusters that give whole nodes)."""
    processes_per_node: Optional[int] = None
    """Ranks on each node; null for gpus_per_node."""
    cpus_per_node: Optional[int] = None
    """Cores of each node; null leaves it to the cluster."""
    memory: Optional[str] = None
    """Memory of each node in the form of sbatch's --mem: 900G, or 0 for all of it; null leaves it to the cluster."""
    exclusive: bool = True
    """No other job on the nodes."""
    account: Optional[str] = None
    partition: Optional[str] = None
    qos: Optional[str] = None
    time: str = "04:00:00"
    """Limit of one allocation in Slurm's format, such as 30 (minutes), 04:00:00 or 2-12:00:00."""
    signal_before_end_s: int = 600
    """How long before the limit the run is told to save and leave. The longest update and a save must fit in."""
    requeue: bool = True
    """Queue the job again after it has saved before its limit; it continues from there."""
    max_requeues: int = 100
    python: Optional[str] = None
    """Interpreter of the training environment as the nodes see it, inside the container where there is one; null takes
    .venv/bin/python in project_dir where that is there, else python."""
    project_dir: Optional[str] = None
    """This project's folder as the nodes see it, in which the run starts; null for the current directory."""
    job_dir: Optional[str] = None
    """Where scripts and logs of submissions go, on a file system that all nodes share; null for outputs/jobs in
    project_dir."""
    container_image: Optional[str] = None
    """Image in which pyxis and enroot run the training: a name or a .sqsh file; null runs without a container."""
    container_mounts: List[str] = field(default_factory=list)
    """SOURCE:TARGET or SOURCE:TARGET:FLAGS, besides project_dir and job_dir, which are always there."""
    ssh: SshSettings = field(default_factory=SshSettings)
    env: Dict[str, str] = field(default_factory=dict)
    """Environment variables of the run; nothing secret, for they are written into the script."""
    secrets: List[str] = field(default_factory=list)
    """Names of environment variables that the run needs; their values are never written anywhere."""
    secrets_file: Optional[str] = None
    """Shell file on the nodes that sets them, for a cluster where sbatch does not pass this machine's variables on."""
    setup: List[str] = field(default_factory=list)
    """Shell lines on each node before training, such as `module load cuda`."""
    rendezvous_port: Optional[int] = None
    """Port on the first node at which the ranks meet; null derives one from the job's number."""
    sbatch: Dict[str, str] = field(default_factory=dict)
    """Further options of sbatch, such as {reservation: week12, gres: "gpu:8"}."""

    def interpreter(self, project_dir: str) -> str:
        """`python`; where that is null, the environment of `make install` in the project's folder, if it is there.

        Args:
            project_dir: the project's folder, as the nodes see it; a folder of this machine without ssh.host.
        """
        if self.python is not None:
            return self.python
        installed = Path(project_dir) / ".venv" / "bin" / "python"
        is_seen_here = not (self.ssh.host or self.container_image)
        return str(installed) if is_seen_here and os.access(installed, os.X_OK) else "python"

    @property
    def is_local(self) -> bool:
        return self.executor == "local"

    @property
    def ranks_per_node(self) -> int:
        """Processes that torchrun starts on each node."""
        number = self.processes_per_node if self.processes_per_node is not None else self.gpus_per_node
        assert number is not None, "validated"
        return number

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def load_settings(path: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Read and check a submission's settings.

    Args:
        path: YAML file, or None for the defaults.
        flags: values by key that overrule the file's; None stands for a flag that was not given.

    Raises:
        ConfigError: an unknown key, a value of the wrong type, or settings that contradict each other.
    """
    place = "the flags" if path is None else str(path)
    layer = {} if path is None else _read(path)
    layer = {**layer, **{key: str(value) for key, value in flags.items() if value is not None}}
    if problems := list(key_problems(layer, Settings, prefix="", place=place)):
        raise ConfigError.of(problems, where=place)
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Settings), layer))
    except OmegaConfBaseException as error:
        value = look_up(layer, error.full_key or "")
        raise ConfigError(f"{error.full_key}={value!r} in {place}: {str(error).splitlines()[0]}") from error
    assert isinstance(settings, Settings)
    if problems := _problems(settings):
        raise ConfigError.of(problems, where=place)
    return settings


def seconds_of(time_limit: str) -> int | None:
    """Seconds of a time limit in Slurm's format; None if it is no such limit."""
    days_text, dash, rest = time_limit.rpartition("-")
    parts = rest.split(":")
    if len(parts) > 3 or not all(part.isdecimal() for part in parts) or (dash and not days_text.isdecimal()):
        return None
    numbers = [int(part) for part in parts]
    if dash:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(days_text) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 3:
        return (numbers[0] * 60 + numbers[1]) * 60 + numbers[2]
    minutes, seconds = (*numbers, 0)[:2]
    return minutes * 60 + seconds


def _read(path: Path) -> dict[str, Any]:
    """The file's content; a setting that takes text gets it as it is written: 12:00:00 and `on` stay texts."""
    content = read_yaml(read_text(path, "settings file"), Settings, str(path))
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys such as nodes and partition.")
    return content


def _problems(settings: Settings) -> list[str]:
    """Problems of single settings, and of settings that contradict each other."""
    problems = []
    if settings.executor not in EXECUTORS:
        problems.append(str(choice_problem("executor", settings.executor, EXECUTORS)))
    for key in ("nodes", "gpus_per_node", "processes_per_node", "cpus_per_node", "rendezvous_port", "max_requeues"):
        value = getattr(settings, key)
        if value is not None and value < 1:
            remedy = " Use null where Slurm hands out no GPUs." if key == "gpus_per_node" else ""
            problems.append(f"{key}={value}: must be at least 1.{remedy}")
    if settings.gpus_per_node is None and settings.processes_per_node is None:
        problems.append("gpus_per_node=null needs processes_per_node, the number of ranks on each node.")
    if settings.is_local:
        problems += _local_problems(settings)
    else:
        problems += _slurm_problems(settings)
    return problems + _environment_problems(settings)


def _local_problems(settings: Settings) -> list[str]:
    only_slurm = {"nodes": settings.nodes > 1, "container_image": settings.container_image, "ssh": settings.ssh.host}
    return [
        f"{key}: executor=local runs on this machine; use executor=slurm." for key, used in only_slurm.items() if used
    ]


def _slurm_problems(settings: Settings) -> list[str]:
    problems = []
    limit_s, before_s = seconds_of(settings.time), settings.signal_before_end_s
    if not limit_s:
        problems.append(
            f"time={settings.time}: not a time limit in Slurm's format, such as 30 (minutes), 04:00:00 or 2-12:00:00."
        )
    elif not 0 < before_s <= 65535:
        problems.append(f"signal_before_end_s={before_s}: Slurm takes 1 to 65535.")
    elif before_s + SLURM_LEAD_S >= limit_s:
        problems.append(
            f"signal_before_end_s={before_s}: Slurm may send it {SLURM_LEAD_S} s earlier still, and "
            f"time={settings.time} is {limit_s} s, so the run would hardly start. Lower it, or raise time."
        )
    if settings.ssh.host:
        for key in ("project_dir", "job_dir"):
            path = getattr(settings, key)
            if path is None or not path.startswith("/"):
                problems.append(f"{key}={path}: with ssh.host, give it as an absolute path on the cluster.")
        if not settings.ssh.user:
            problems.append(f"ssh.host={settings.ssh.host} needs ssh.user.")
    for mount in settings.container_mounts:
        if not all(mount.split(":")) or not 2 <= len(mount.split(":")) <= 3 or "," in mount:
            problems.append(f"container_mounts: {mount} is not of the form SOURCE:TARGET or SOURCE:TARGET:FLAGS.")
    if settings.container_mounts and not settings.container_image:
        problems.append("container_mounts without container_image: there is nothing to mount into.")
    for option in settings.sbatch:
        if said := _SET_ELSEWHERE.get(option.replace("-", "_")):
            problems.append(f"sbatch.{option}: set {said} instead.")
    return problems


def _environment_problems(settings: Settings) -> list[str]:
    problems = [  # an entry may be a secret: it is not repeated
        f"{key}: entry {number} is no name of an environment variable. Only names belong here."
        for key, names in (("env", settings.env), ("secrets", settings.secrets))
        for number, name in enumerate(names, 1)
        if not _VARIABLE.fullmatch(name)
    ]
    problems += [
        f"env.{name} looks like a secret, and env is written into the script. List the name below secrets instead."
        for name in settings.env
        if looks_secret(name)
    ]
    twice = sorted(set(settings.env) & set(settings.secrets))
    return problems + [f"{name} stands below env and below secrets." for name in twice]
