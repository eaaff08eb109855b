"""Checks that trainer and servers have the same NCCL. With different ones the first broadcast fails or hangs.

The library that is loaded is asked for its version. `torch.cuda.nccl.version()` is that of the headers that torch was
built with, and stays the same whatever is installed.
"""

from __future__ import annotations

import json
import subprocess

from megatron_fipo.rollout.servers.http import ServerError

_PROGRAM = """
import ctypes, json, torch
version = ctypes.c_int()
ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
print(json.dumps([torch.__version__, version.value]))
"""
"""torch is imported first: it loads the library from where pip has put it."""
_TIMEOUT_S = 300.0
"""Importing torch takes minutes from a slow file system."""


def nccl_of(python: str) -> tuple[str, int]:
    """(torch's version, NCCL's number, in which 22907 is 2.29.7) in an interpreter's environment.

    Raises:
        ServerError: if the interpreter cannot be run, or its torch has no NCCL.
    """
    try:
        answer = subprocess.run(
            [python, "-c", _PROGRAM], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ServerError(f"{python} could not be asked for its NCCL's version: {error}") from error
    if answer.returncode:
        words = answer.stderr.strip().splitlines()[-1:] or ["no words"]
        raise ServerError(f"{python} has no NCCL beside its torch: {words[0]}")
    torch_version, nccl_version = json.loads(answer.stdout.strip().splitlines()[-1])
    return str(torch_version), int(nccl_version)


def check_same_nccl(ours: str, theirs: str) -> None:
    """Refuse interpreters whose NCCL differs.

    Args:
        ours: the trainer's interpreter.
        theirs: the servers' interpreter.

    Raises:
        ServerError: naming both versions and what to do.
    """
    (our_torch, our_nccl), (their_torch, their_nccl) = nccl_of(ours), nccl_of(theirs)
    if our_nccl != their_nccl:
        raise ServerError(
            f"servers.weight_sync=distributed: all members of an NCCL group must have the same NCCL. The trainer's is "
            f"{_text(our_nccl)} (torch {our_torch}, {ours}), the servers' is {_text(their_nccl)} (torch {their_torch}, "
            f"{theirs}). Install the same nvidia-nccl-cu13 in both environments (docs/rollout_engines.md says how), or "
            "set servers.weight_sync=disk."
        )


def _text(version: int) -> str:
    """A version number of NCCL as people write it. From 2.9 on it counts ten thousands, hundreds and ones."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"
