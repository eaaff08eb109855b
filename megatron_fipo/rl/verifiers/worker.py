"""A verifier's worker process.

    python -m megatron_fipo.rl.verifiers.worker <fd> <timeout_s> <memory_gib> [verifier ...]

Started by `pool` with one end of a socket pair as `fd`. Imports the verifiers named, reports ready, then answers
batches of jobs one verdict at a time. It ends when the other side closes, and dies by itself if that cannot reach it:
the pool is the one to enforce time-outs, but a hanging worker must not outlive a killed pool.

Started afresh, not forked and not through `multiprocessing`: a fork of a process with torch's threads can deadlock,
and multiprocessing's spawn would import the main program, hence torch and Megatron, into every worker.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection

from megatron_fipo.rl.verifiers.judging import judge
from megatron_fipo.rl.verifiers.registry import load_verifier
from megatron_fipo.rl.verifiers.verdict import JobVerifier

SELF_DESTRUCT_FACTOR = 3.0
"""A worker whose pool is gone ends itself after so many time-outs on one response."""


def limit_memory(memory_gib: float) -> None:
    """Let the process's address space grow to `memory_gib` GiB; beyond, Python raises MemoryError."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def serve(connection: Connection, timeout_s: float) -> None:
    """Answer batches until the other side closes.

    A batch is a list of pickled jobs. Each is answered by (verdict, time.monotonic() at its end), in order.
    """
    while True:
        try:
            batch: list[bytes] = connection.recv()
        except EOFError:
            return
        for pickled in batch:
            # The kernel's default action for the alarm ends the process, whatever holds the interpreter lock.
            signal.setitimer(signal.ITIMER_REAL, SELF_DESTRUCT_FACTOR * timeout_s)
            verdict = judge(pickle.loads(pickled), timeout_s)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            try:
                connection.send((verdict, time.monotonic()))
            except (BrokenPipeError, ConnectionResetError):
                return


def main(arguments: list[str]) -> None:
    """Entry point; `arguments` as in the module's first line."""
    fd = int(arguments[0])
    os.set_inheritable(fd, False)
    connection = Connection(fd)
    # What a verifier prints must not mix with the run's console.
    sys.stdout = sys.stderr
    try:
        for name in arguments[3:]:
            verifier = load_verifier(name)
            if isinstance(verifier, JobVerifier):
                verifier.check_ready()
    except (ImportError, AttributeError, RuntimeError):
        connection.send(traceback.format_exc())
        return
    limit_memory(float(arguments[2]))
    connection.send("")
    serve(connection, timeout_s=float(arguments[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
