"""A verifier's worker process.

    python -m megatron_fipo.verifiers.worker <fd>

`worker_process` starts it with one end of a socket pair as `fd`, and with an environment for the kind of its verifiers
(`isolation`). It receives its verifiers' names over the socket, because they may contain a key and everybody can read a
command line. It imports the verifiers, confines itself, reports that it is ready, and answers batches of jobs, one
verdict at a time. It ends when the pool closes the socket. The pool enforces the time-outs; a worker that hangs ends
itself much later, so that it does not outlive a killed pool.

A worker is neither forked nor started through `multiprocessing`: a fork of a process with torch's threads can deadlock,
and multiprocessing's spawn would import the main program, hence torch and Megatron, into every worker.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection

from megatron_fipo.system.nearest_name import did_you_mean
from megatron_fipo.verifiers import confinement
from megatron_fipo.verifiers.expressions_only import NotAnExpressionError, expressions_only, no_code
from megatron_fipo.verifiers.forked_judge import ForkingJudge, ThreadsError
from megatron_fipo.verifiers.isolation import Isolation, WorkerSetup, package_root
from megatron_fipo.verifiers.judging import judge
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS
from megatron_fipo.verifiers.registry import CannotLoadError, load_verifier, shown_name
from megatron_fipo.verifiers.syscall_filter import SandboxUnavailableError, syscall_filter
from megatron_fipo.verifiers.verdict import JobVerifier, Verdict
from megatron_fipo.verifiers.wire import pack_frame, verdict_fields, write_all

SELF_DESTRUCT_FACTOR = 3.0
"""A worker ends itself after this many time-outs on one response; a pool that is alive has killed it by then."""

Judge = Callable[[str, bytes], Verdict]
"""(verifier's name, pickled job) -> Verdict."""


class CannotJudgeError(RuntimeError):
    """A verifier cannot be used, and trying again would not help; the message says which, why and what to do."""


def start(setup: WorkerSetup, connection_fd: int) -> Judge:
    """Import the verifiers and confine this process as their kind requires.

    Args:
        setup: the worker's settings.
        connection_fd: the socket to the pool, which forked children close.

    Returns:
        The function that judges one job.

    Raises:
        CannotJudgeError: if a verifier cannot be imported or is not ready, or if it must be confined and cannot be.
    """
    for name in setup.verifiers:
        _load(name)
    confinement.limit_memory(setup.memory_gib)
    isolation = setup.isolation
    if isolation in (Isolation.PROGRAMS, Isolation.TRUSTED):
        return _judge_here(setup.timeout_s)
    try:
        # First, because it raises where this system cannot be confined at all.
        program = syscall_filter(threads=isolation is Isolation.REMOTE, sockets=isolation is Isolation.REMOTE)
        # Opened now, since /proc cannot be read later.
        tasks_fd = os.open("/proc/self/task", os.O_RDONLY) if isolation.is_forked else -1
        confinement.limit_files()
        if isolation is Isolation.REMOTE:
            confinement.restrict_calls(program)
            return _judge_here(setup.timeout_s)
        modules = [BUILTIN_VERIFIERS.get(name, name).partition(":")[0] for name in setup.verifiers]
        confinement.restrict_reading(confinement.readable_folders(modules, package_root()))
        if isolation is Isolation.COMPUTING:
            confinement.restrict_calls(program)
            return _judge_expressions(setup.timeout_s)
        return _fork_for_each(setup, program, connection_fd, tasks_fd)
    except SandboxUnavailableError as error:
        if isolation.is_forked:
            raise CannotJudgeError(_no_confinement(setup.verifiers, error)) from error
        # COMPUTING and REMOTE may run unconfined: they do not run text as code, and have the allowed environment only.
        return _judge_here(setup.timeout_s) if isolation is Isolation.REMOTE else _judge_expressions(setup.timeout_s)


def _judge_here(timeout_s: float) -> Judge:
    return lambda name, pickled: judge(pickle.loads(pickled), timeout_s)


def _judge_expressions(timeout_s: float) -> Judge:
    def judge_one(name: str, pickled: bytes) -> Verdict:
        with expressions_only():
            return judge(pickle.loads(pickled), timeout_s)

    return judge_one


def _fork_for_each(setup: WorkerSetup, program: bytes, connection_fd: int, tasks_fd: int) -> Judge:
    names = ", ".join(setup.verifiers)
    hint = ""
    if setup.isolation is Isolation.OWN:
        hint = (
            "Verifiers run confined: no network, no writing, no processes or threads, no files but their modules' "
            "folder and Python's; one that needs more, and that you would trust with what a model writes, is named "
            "in verifier.trusted"
        )
    try:
        judging = ForkingJudge(setup.timeout_s, program, (connection_fd, tasks_fd), hint)
    except ThreadsError as error:
        raise CannotJudgeError(
            f"verifier {names} cannot be used: {error}. Start threads where they are needed, or name the verifier in "
            "verifier.trusted"
        ) from error
    if setup.isolation is Isolation.OWN:
        return judging.judge
    from megatron_fipo.verifiers.reasoning_gym_tasks import prepare

    def judge_task(name: str, pickled: bytes) -> Verdict:
        job = pickle.loads(pickled)
        prepare(job.reference)
        # Most scorers only compute. If a scorer did no more than that, nothing of the response can have run, and a
        # fork, which takes a hundred times as long, is not needed.
        verdict = None
        # Formatting a scorer's exception may read source files, which trips the watch and raises outside the scorer.
        with suppress(NotAnExpressionError), no_code() as watch:
            verdict = judge(job, setup.timeout_s)
        return judging.judge(name, pickled) if verdict is None or watch.tripped else verdict

    return judge_task


def _no_confinement(names: Sequence[str], error: SandboxUnavailableError) -> str:
    named = ", ".join(names)
    return (
        f"verifier {named} cannot be used here: a response may run as code in it, so it must be confined, and {error}. "
        "Run on Linux whose kernel and container allow seccomp; or, on a machine that may run whatever a model "
        f"writes with all of your rights, set verifier.trusted=[{named}]"
    )


def _load(name: str) -> None:
    """Import a verifier and call its check_ready; raises CannotJudgeError with the reason."""
    try:
        verifier = load_verifier(name)
        if isinstance(verifier, JobVerifier):
            verifier.check_ready()
    except (Exception, SystemExit) as error:
        raise CannotJudgeError(f"verifier {shown_name(name)} cannot be used: {_reason(name, error)}") from error


def _reason(name: str, error: BaseException) -> str:
    """Say what went wrong with a verifier, where, and what to do."""
    module, _, function = name.partition(":")
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, (SandboxUnavailableError, CannotLoadError)):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        if function and (module == error.name or module.startswith(f"{error.name}.")):
            return (
                f"there is no module {error.name}. It is looked for in the current folder, {os.getcwd()}, in "
                "PYTHONPATH and among the installed packages"
            )
        return f"{said}. Install that package into this environment, {sys.prefix}"
    loaded = sys.modules.get(module)
    if isinstance(error, AttributeError) and loaded is not None and not hasattr(loaded, function):
        public = [key for key in vars(loaded) if not key.startswith("_")]
        hint = did_you_mean(function, public, shown_as=f"{module}:{{}}")
        return f"the module {loaded.__file__} has no attribute {function}.{hint}"
    ours = (__file__, load_verifier.__wrapped__.__code__.co_filename)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and frame.filename not in ours
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{said}{place}"


def _unforeseen(names: Sequence[str], error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename}:{frame.lineno}"
    return f"the worker of {', '.join(names)} cannot start: {type(error).__name__}: {error} ({place})"


def serve(connection: Connection, judge_one: Judge, timeout_s: float) -> None:
    """Answer batches until the pool closes the connection.

    A batch is a list of (verifier's name, pickled job). Each job is answered, in order, by a frame with the verdict's
    fields and done_at, the time.monotonic() at which it was judged.
    """
    while True:
        try:
            batch: list[tuple[str, bytes]] = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        for name, pickled in batch:
            # The default action of SIGALRM ends the process, even if C code holds the interpreter lock.
            signal.setitimer(signal.ITIMER_REAL, SELF_DESTRUCT_FACTOR * timeout_s)
            verdict = judge_one(name, pickled)
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            try:
                write_all(connection.fileno(), pack_frame({**verdict_fields(verdict), "done_at": time.monotonic()}))
            except (BrokenPipeError, ConnectionResetError):
                return


def main(arguments: list[str]) -> None:
    """Entry point; the module's docstring shows the argument."""
    connection = Connection(int(arguments[0]))
    os.set_inheritable(connection.fileno(), False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        setup: WorkerSetup = connection.recv()
    except (EOFError, ConnectionResetError):
        return
    try:
        judge_one = start(setup, connection.fileno())
    except Exception as error:  # noqa: BLE001 - any exception would happen in another worker, too
        problem = str(error) if isinstance(error, CannotJudgeError) else _unforeseen(setup.verifiers, error)
        write_all(connection.fileno(), pack_frame({"problem": problem}))
        return
    write_all(connection.fileno(), pack_frame({"problem": ""}))
    serve(connection, judge_one, setup.timeout_s)
    # If the pool was killed, nobody else removes the folder; a confined worker may not, either.
    with suppress(OSError):
        shutil.rmtree(os.environ["TMPDIR"])


if __name__ == "__main__":
    main(sys.argv[1:])
