"""The shell text of a job: what each node runs, and what the batch script does around it.

Before the time limit Slurm sends SIGUSR1, on which the run saves and `node_process` leaves with EXIT_STOPPED; the batch
script then queues the job again. After scancel, preemption, scontrol requeue or a lost node, whether the job is queued
again is Slurm's decision, not the script's.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_fipo.launch.settings import Settings
from megatron_fipo.system.exit_codes import EXIT_BAD_INPUT, EXIT_STOPPED

DEFAULT_FIRST_PORT = 20000
"""The first of ten thousand rendezvous ports; the job's number picks one of them."""

_RUN = """\
exec {python} -m megatron_fipo.launch.node_process \\
    {python} -m torch.distributed.run {options} \\
    -m megatron_fipo.train {arguments}
"""

_SECRET_CHECK = """\
for name in {names}; do
    if [ -z "${{!name:-}}" ]; then
        echo "error: the environment variable $name is not set on $(hostname). {remedy}" >&2
        exit {exit_bad_input}
    fi
done
"""

_SETUP = """\
export FIPO_HEAD_ADDRESS=${head_node_ip%% *}
unset SLURM_UNBUFFEREDIO # srun would open a terminal for the run, and progress bars would fill the log
"""

_REQUEUE = """\
queue_again() {{
    local status=$?
    if [ "$status" -eq {exit_stopped} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
trap queue_again EXIT
"""


def node_script(settings: Settings, project_dir: str, arguments: Sequence[str]) -> str:
    """The script that each node runs: it prepares the environment and starts one torchrun.

    Args:
        settings: validated.
        project_dir: where the run starts.
        arguments: those of `megatron_fipo.train`: the configuration file and overrides.
    """
    parts = ["trap '' USR1 # until there is a run to save", f"cd {shlex.quote(project_dir)} || exit {EXIT_BAD_INPUT}"]
    parts += [f"export {name}={shlex.quote(value)}" for name, value in settings.env.items()]
    if settings.secrets_file:
        parts.append(f"set -a; . {shlex.quote(settings.secrets_file)}; set +a")
    if settings.secrets:
        names = " ".join(settings.secrets)
        parts.append(_SECRET_CHECK.format(names=names, remedy=_where_to_set(settings), exit_bad_input=EXIT_BAD_INPUT))
    parts += settings.setup
    python, options = shlex.quote(settings.interpreter(project_dir)), " ".join(_torchrun_options(settings))
    parts.append(_RUN.format(python=python, options=options, arguments=shlex.join(arguments)))
    return "\n".join(parts)


def batch_setup(settings: Settings) -> str:
    """Lines of the batch script before its srun: the first node's address, and queueing the job again at the end."""
    if not settings.requeue:
        return _SETUP
    return _SETUP + _REQUEUE.format(exit_stopped=EXIT_STOPPED, max_requeues=settings.max_requeues)


def _where_to_set(settings: Settings) -> str:
    if settings.secrets_file:
        return f"Set it in {settings.secrets_file}."
    return "Set it in a file there, named by secrets_file." if settings.ssh.host else "Set it where you submit."


def _torchrun_options(settings: Settings) -> list[str]:
    processes = f"--nproc-per-node {settings.ranks_per_node}"
    if settings.is_local:
        return ["--standalone", processes]
    port = settings.rendezvous_port or f"$(({DEFAULT_FIRST_PORT} + SLURM_JOB_ID % 10000))"
    return [
        f"--nnodes {settings.nodes}",
        processes,
        "--rdzv-backend c10d",
        '--rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"',
        f'--rdzv-endpoint "$FIPO_HEAD_ADDRESS:{port}"',
    ]
