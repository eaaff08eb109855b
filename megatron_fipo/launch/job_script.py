"""The shell text of a job: what each node runs, and what the batch script does around it.

Of the signals that end a run:

- Slurm sends SIGUSR1 to every process of the step some time before the limit. torchrun and all below it ignore it;
  the node's script takes it and sends SIGTERM to the ranks alone. They save and leave, and have until the limit:
  torchrun, had it got the SIGTERM, would kill them after 30 s. The script then leaves with EXIT_SAVED, and the batch
  script queues the job again.
- scancel, preemption and scontrol requeue send SIGTERM to every process and SIGKILL some time later (KillWait or
  GraceTime). The ranks save if they can; what is queued again then is Slurm's decision.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from megatron_fipo.launch.settings import Settings

EXIT_BAD_INPUT = 2
EXIT_SAVED = 3
"""Of the node's script, when it was told of the time limit."""
DEFAULT_FIRST_PORT = 20000
"""Rendezvous ports are this and the ten thousand above."""

_TORCHRUN = """\
# Slurm announces the time limit to all processes by SIGUSR1; only this script is to heed it.
trap '' USR1
{launcher} \\
    -m megatron_fipo.train {arguments} &
torchrun=$!

told_to_stop=0
stop_the_ranks() {{
    told_to_stop=1
    local ranks
    ranks=$(cat /proc/$torchrun/task/*/children 2>/dev/null)
    echo "the time limit is near: SIGTERM to the ranks (processes ${{ranks:-of torchrun}})" >&2
    kill -TERM ${{ranks:-$torchrun}}
}}
trap stop_the_ranks USR1
trap : TERM INT HUP # torchrun gets these itself

status=0
wait "$torchrun" || status=$?
while kill -0 "$torchrun" 2>/dev/null; do # a signal, not torchrun's end, was what ended the wait
    status=0
    wait "$torchrun" || status=$?
done
if [ "$told_to_stop" = 1 ] && [ "$status" -ne 0 ]; then
    status={exit_saved}
fi
exit "$status"
"""

_SECRET_CHECK = """\
for name in {names}; do
    if [ -z "${{!name:-}}" ]; then
        echo "error: the environment variable $name is not set on $(hostname). {remedy}" >&2
        exit {exit_bad_input}
    fi
done
"""

_REQUEUE = """\
export FIPO_HEAD_ADDRESS=${{head_node_ip%% *}}
unset SLURM_UNBUFFEREDIO # srun would open a terminal for the run, and progress bars would fill the log
queue_again() {{
    local status=$?
    if [ "$status" -eq {exit_saved} ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {max_requeues} ]; then
        scontrol requeue "$SLURM_JOB_ID"
    fi
}}
trap queue_again EXIT
"""


def node_script(settings: Settings, project_dir: str, arguments: Sequence[str]) -> str:
    """What each node runs: one torchrun, and what its processes need.

    Args:
        settings: validated.
        project_dir: where the run starts.
        arguments: of `megatron_fipo.train`: the configuration file and overrides.
    """
    parts = ["set -u -o pipefail", f"cd {shlex.quote(project_dir)} || exit {EXIT_BAD_INPUT}"]
    parts += [f"export {name}={shlex.quote(value)}" for name, value in settings.env.items()]
    if settings.secrets_file:
        parts.append(f"set -a; . {shlex.quote(settings.secrets_file)}; set +a")
    if settings.secrets:
        remedy = f"Set it in {settings.secrets_file}." if settings.secrets_file else "Set it where you submit."
        parts.append(
            _SECRET_CHECK.format(names=" ".join(settings.secrets), remedy=remedy, exit_bad_input=EXIT_BAD_INPUT)
        )
    parts += settings.setup
    parts.append(
        _TORCHRUN.format(
            launcher=" ".join([shlex.quote(settings.python), "-m torch.distributed.run", *_torchrun_options(settings)]),
            arguments=shlex.join(arguments),
            exit_saved=EXIT_SAVED,
        )
    )
    return "\n".join(parts)


def batch_setup(settings: Settings) -> str:
    """Lines of the batch script before its srun: the first node's address, and queueing the job again at the end."""
    return _REQUEUE.format(exit_saved=EXIT_SAVED, max_requeues=settings.max_requeues if settings.requeue else 0)


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
