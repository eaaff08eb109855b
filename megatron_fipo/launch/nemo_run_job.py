"""A job as NeMo-Run knows it: executor, tunnel, script; printed or submitted.

NeMo-Run pins packages that the trainer has in other versions, so it is imported only here, when a job is submitted or
printed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any

from megatron_fipo.launch import job_script
from megatron_fipo.launch.node_process import children_of
from megatron_fipo.launch.settings import Settings

INSTALL_HINT = """\
submit needs NeMo-Run, and this Python does not have it. It pins packages that the trainer has in other versions, so it
gets an environment of its own:
  python tools/engines/install.py nemo-run
prints the path of that environment's Python; with it, from the project's folder:
  THAT_PYTHON -m megatron_fipo.cli submit …"""


class NemoRunMissingError(ValueError):
    """NeMo-Run is not installed here."""


class SubmissionError(ValueError):
    """The job was not accepted."""


@dataclass(frozen=True)
class Job:
    """A job to submit.

    Attributes:
        name: name of the run.
        settings: validated.
        project_dir, job_dir: as the nodes see them.
        node_script: what each node runs, see `job_script.node_script`.
    """

    name: str
    settings: Settings
    project_dir: str
    job_dir: str
    node_script: str


@dataclass(frozen=True)
class Submitted:
    """A job that was handed over.

    Attributes:
        job_id: Slurm's number of the job; empty for a local one.
        log_dir: folder of its logs, on the cluster.
        succeeded: whether a local job, which has ended, succeeded; True for a job of Slurm's.
    """

    job_id: str
    log_dir: str
    succeeded: bool = True


def rendered(job: Job) -> str:
    """The sbatch script (for a local job there is none) and the script that each node runs, without submitting.

    Raises:
        NemoRunMissingError: if NeMo-Run is not installed.
    """
    with _experiment(job) as experiment:
        experiment.dryrun(log=False)
        batch_script = "" if job.settings.is_local else experiment.jobs[0]._dryrun_info.request.materialize()
    return "\n".join([batch_script, f"# ---- {job.name}.sh, which runs on each node:", job.node_script])


def submit(job: Job) -> Submitted:
    """Hand the job to Slurm and return at once; a local one runs here, to its end.

    Raises:
        NemoRunMissingError: if NeMo-Run is not installed.
        SubmissionError: if sbatch refuses the job, or the cluster cannot be reached.
    """
    is_local = job.settings.is_local
    with _stopped_by_signals() if is_local else nullcontext(), _experiment(job) as experiment:
        import invoke  # type: ignore[import-not-found]
        import paramiko  # type: ignore[import-untyped]

        try:
            experiment.run(detach=not is_local, tail_logs=is_local)
        except invoke.exceptions.UnexpectedExit as error:
            result = error.result
            raise SubmissionError(f"`{result.command}` failed: {(result.stderr or result.stdout).strip()}") from error
        except (paramiko.SSHException, OSError) as error:
            where = job.settings.ssh.host or "this machine"
            raise SubmissionError(f"{where}: {error or type(error).__name__}") from error
        submitted = experiment.jobs[0]
    if is_local:  # leaving the experiment has waited for it
        return Submitted("", submitted.executor.job_dir, succeeded=submitted.state.name == "SUCCEEDED")
    return Submitted(submitted.handle.rpartition("/")[2], f"{submitted.executor.tunnel.job_dir}/{job.name}")


def executor(job: Job) -> Any:
    """NeMo-Run's executor of the job."""
    import nemo_run

    settings = job.settings
    if settings.is_local:
        return nemo_run.LocalExecutor()
    tunnel = nemo_run.LocalTunnel(job_dir="")  # NeMo-Run's home, see _experiment
    if settings.ssh.host:
        ssh = settings.ssh
        where = f"{job.job_dir}/experiments"
        tunnel = nemo_run.SSHTunnel(host=ssh.host, user=ssh.user, port=ssh.port, identity=ssh.identity, job_dir=where)
    srun_args = ["--cpu-bind=none"]  # one task a node, whose ranks share all its cores
    if settings.cpus_per_node:
        srun_args.append(f"--cpus-per-task={settings.cpus_per_node}")  # srun does not take it over from sbatch
    return nemo_run.SlurmExecutor(
        account=settings.account,
        partition=settings.partition,
        qos=settings.qos,
        time=settings.time,
        nodes=settings.nodes,
        ntasks_per_node=1,
        gpus_per_node=settings.gpus_per_node,
        cpus_per_task=settings.cpus_per_node,
        mem=settings.memory,
        exclusive=settings.exclusive or None,
        signal=f"USR1@{settings.signal_before_end_s}",
        job_name_prefix="megatron-fipo.",
        container_image=settings.container_image,
        container_mounts=_mounts(job),
        container_env=settings.secrets or None,  # or the image's own values would win
        srun_args=srun_args,
        setup_lines=job_script.batch_setup(settings),
        additional_parameters={key.replace("-", "_"): value for key, value in settings.sbatch.items()},
        tunnel=tunnel,
        packager=nemo_run.Packager(),  # the project lies on the cluster; nothing is packed
        poll_estimated_start_time=False,
    )


@contextmanager
def _experiment(job: Job) -> Iterator[Any]:
    """NeMo-Run's experiment with this one job; it keeps scripts and logs below job_dir."""
    if importlib.util.find_spec("nemo_run") is None:
        raise NemoRunMissingError(INSTALL_HINT)
    if not job.settings.ssh.host:  # read when NeMo-Run is imported; with ssh, this machine's own home serves
        os.environ["NEMORUN_HOME"] = job.job_dir
    import nemo_run

    with nemo_run.Experiment(
        job.name,
        log_level="WARN",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
        serialize_metadata_for_scripts=False,
    ) as experiment:
        experiment.add(nemo_run.Script(inline=job.node_script), executor(job), name=job.name)
        yield experiment


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Have Ctrl-C and SIGTERM make a local run save and leave.

    NeMo-Run starts the run in a session of its own, where a terminal's Ctrl-C does not reach it, and keeps waiting.
    """
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        # The first signal stands for the one that Slurm sends before its limit; a second one ends the run at once.
        forwarded = signal.SIGTERM if received else signal.SIGUSR1
        received.append(number)
        for group in {os.getpgid(child) for child in children_of(os.getpid())} - {os.getpgrp()}:
            os.killpg(group, forwarded)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _mounts(job: Job) -> list[str]:
    """The settings' mounts, and the project's folder if they lack it."""
    settings = job.settings
    if settings.container_image is None:
        return []
    targets = {mount.split(":")[1] for mount in settings.container_mounts}
    project = [] if job.project_dir in targets else [f"{job.project_dir}:{job.project_dir}"]
    return [*settings.container_mounts, *project]
