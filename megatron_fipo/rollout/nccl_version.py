"""Whether trainer and server have the same NCCL: one that differs ends the first broadcast, or hangs in it."""

from __future__ import annotations

import json
import subprocess

from megatron_fipo.rollout.server_http import ServerError

_PROGRAM = "import json, torch; print(json.dumps([torch.__version__, list(torch.cuda.nccl.version())]))"
_TIMEOUT_S = 300.0
"""Importing torch takes minutes from a slow file system."""


def nccl_of(python: str) -> tuple[str, tuple[int, ...]]:
    """(torch's version, its NCCL's version) in an interpreter's environment.

    Raises:
        ServerError: if the interpreter cannot be run, or its torch has no NCCL.
    """
    try:
        answer = subprocess.run(
            [python, "-c", _PROGRAM], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"servers.python={python} could not be asked for its NCCL's version: {error}") from error
    if answer.returncode:
        words = answer.stderr.strip().splitlines()[-1:] or ["no words"]
        raise ServerError(f"servers.python={python} has no NCCL that torch knows of: {words[0]}")
    torch_version, nccl_version = json.loads(answer.stdout.strip().splitlines()[-1])
    return torch_version, tuple(nccl_version)


def check_same_nccl(ours: str, theirs: str) -> None:
    """Refuse interpreters whose NCCL differs.

    Args:
        ours: the trainer's interpreter. theirs: the servers'.

    Raises:
        ServerError: naming both versions and what to do.
    """
    (our_torch, our_nccl), (their_torch, their_nccl) = nccl_of(ours), nccl_of(theirs)
    if our_nccl != their_nccl:
        raise ServerError(
            f"servers.weight_sync=distributed: all members of an NCCL group must have the same NCCL. The trainer's is "
            f"{_text(our_nccl)} (torch {our_torch}, {ours}), the servers' is {_text(their_nccl)} (torch {their_torch}, "
            f"{theirs}). Install the same nvidia-nccl in both environments (docs/rollout_engines.md says how), or set "
            "servers.weight_sync=disk."
        )


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
