"""Checks a run and the settings of its submission, then prints the job or hands it over."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_fipo.config import Config, ConfigError, load_config, validate
from megatron_fipo.launch import nemo_run_job
from megatron_fipo.launch.job_script import node_script
from megatron_fipo.launch.settings import Settings, load_settings

FLAGS = ("executor", "nodes", "gpus_per_node", "account", "partition", "qos", "time")
"""Settings that the command line has a flag for."""


@dataclass(frozen=True)
class Request:
    """The command line of a submission.

    Attributes:
        config: the run's YAML file.
        overrides: section.key=value, for that file.
        cluster: the settings' YAML file, or None.
        flags: settings by key that overrule it.
        dry_run: print the scripts instead of submitting.
    """

    config: str
    overrides: Sequence[str] = ()
    cluster: Path | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    dry_run: bool = False


def submit_or_show(request: Request) -> int:
    """Submit a run, or print what would be submitted. Returns the exit status.

    Raises:
        ValueError: if the configuration or the settings cannot be used, or NeMo-Run is missing; the message says why.
    """
    settings = load_settings(request.cluster, request.flags)
    config = load_config(request.config, request.overrides)
    validate(config, settings.world_size)
    _check_resume(config, settings)
    job = job_of(request, config, settings)
    if request.dry_run:
        print(nemo_run_job.rendered(job))
        return 0
    if not settings.ssh.host and not settings.secrets_file:
        _check_secrets(settings)
    submitted = nemo_run_job.submit(job)
    if settings.is_local:
        print(f"logs: {submitted.log_dir}")
        return 0 if submitted.succeeded else 1
    print(f"job {submitted.job_id}: {settings.nodes} × {settings.ranks_per_node} ranks, {settings.time} each time")
    print(f"logs: {submitted.log_dir}")
    return 0


def job_of(request: Request, config: Config, settings: Settings) -> nemo_run_job.Job:
    """The job that a request describes.

    Raises:
        ConfigError: if the nodes would not find the configuration file.
    """
    project, jobs = settings.project_dir or str(Path.cwd()), settings.job_dir
    file = Path(request.config)
    if settings.ssh.host:
        if file.is_absolute() or ".." in file.parts:
            raise ConfigError(
                f"CONFIG={file}: with ssh.host, call this from the project's folder with a path relative to it; on the "
                f"cluster the file is looked for in project_dir={project}."
            )
    else:
        project, file = str(Path(project).resolve()), file.resolve()
        jobs = str(Path(jobs or f"{project}/outputs/jobs").resolve())
    assert jobs is not None, "validated"
    return nemo_run_job.Job(
        name=re.sub(r"[^A-Za-z0-9_.-]+", "-", config.run.name),
        settings=settings,
        project_dir=project,
        job_dir=jobs,
        node_script=node_script(settings, project, [str(file), *request.overrides]),
    )


def _check_resume(config: Config, settings: Settings) -> None:
    """Refuse settings under which a job that is queued again would begin anew instead of continuing."""
    if settings.is_local:
        return
    if not config.train.resume:
        raise ConfigError(
            "train.resume=false: Slurm may start the job again (after its time limit, a preemption or a lost node), "
            "and each time it would begin anew. Add train.resume=true."
        )
    if config.checkpoint.every_num_steps == 0:
        print(
            "warning: checkpoint.every_num_steps=0: only the signal before the time limit makes the run save. After a "
            "lost node it begins anew, with the rollouts that it has recorded.",
            file=sys.stderr,
        )


def _check_secrets(settings: Settings) -> None:
    """Refuse missing secrets: Slurm passes this environment on, so what is missing here is missing in the job."""
    if missing := [name for name in settings.secrets if not os.environ.get(name)]:
        raise ConfigError(
            f"secrets: {', '.join(missing)} not set in this environment, which Slurm passes on to the job. Set it, or "
            "set secrets_file to a file on the nodes that sets it."
        )
