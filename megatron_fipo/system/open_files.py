"""Room for the connections of a run of many ranks, which are open files and more than a login shell often allows."""

from __future__ import annotations

import resource

_OTHERS = 512
"""Open files of a rank besides its connections to other ranks: libraries, data, checkpoints, servers."""


def make_room_for(num_ranks: int) -> None:
    """Raise this process's limit of open files to what a run of so many ranks may need.

    A rank opens at most two connections to each other rank: for Python objects and tensors on the CPU, and for NCCL's
    start.

    Raises:
        ValueError: if the system does not allow that many.
    """
    needed = 2 * num_ranks + _OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise ValueError(
            f"A rank of {num_ranks} may need {needed} open files, and the hard limit on this machine is {hard} (ulimit "
            f"-Hn). Raise it where the job starts: ulimit -n {needed} as root, nofile in /etc/security/limits.conf, "
            "LimitNOFILE of the service (Slurm: slurmd), or --ulimit nofile of the container."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
