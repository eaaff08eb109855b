"""Runs torchrun on one node of a job, and keeps Slurm's signal before the time limit away from torchrun.

    python -m megatron_fipo.launch.node_process python -m torch.distributed.run … -m megatron_fipo.train CONFIG

Slurm sends SIGUSR1 to every process of the job some time before its limit. torchrun and its children ignore it: they
inherit that from this process, which handles the signal itself and sends SIGTERM to the ranks alone. They save and
leave, and have until the limit; torchrun, if it received the SIGTERM, would kill them after 30 s.

scancel, preemption and requeueing send SIGTERM to every process. torchrun and ranks then act on their own, and this
process waits for them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from megatron_fipo.system.exit_codes import EXIT_KILLED, EXIT_STOPPED


def run(command: Sequence[str]) -> int:
    """Run torchrun.

    Returns:
        Its exit status, 128 + N if signal N ended it; EXIT_STOPPED if the run was told of its time limit and left
        before its end, so that the job should be queued again.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # torchrun inherits this
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # these torchrun does not inherit
        signal.signal(number, _leave_it_to_torchrun)
    torchrun = subprocess.Popen(command)
    was_told = False

    def stop_the_ranks(number: int, frame: FrameType | None) -> None:
        nonlocal was_told
        was_told = True
        ranks = children_of(torchrun.pid)
        print(f"the time limit is near: SIGTERM to the ranks {ranks or '(none yet: to torchrun)'}", file=sys.stderr)
        for pid in ranks or [torchrun.pid]:
            try:
                os.kill(pid, signal.SIGTERM)
            except ProcessLookupError:  # it has just ended
                continue

    signal.signal(signal.SIGUSR1, stop_the_ranks)
    status = torchrun.wait()
    if was_told and status != 0:
        return EXIT_STOPPED
    return EXIT_KILLED - status if status < 0 else status


def children_of(pid: int) -> list[int]:
    """Processes that a process has started and that have not ended."""
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(child) for child in task.read_text().split()]
        except (FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            continue
    return children


def _leave_it_to_torchrun(number: int, frame: FrameType | None) -> None:
    """Do nothing: torchrun has received the signal, too."""


if __name__ == "__main__":
    _status = run(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # An interpreter that ends in the usual way takes its signal handlers back first, and srun sends SIGTERM to other
    # nodes as soon as one of them is done: the job's exit status would be SIGTERM's.
    os._exit(_status)
