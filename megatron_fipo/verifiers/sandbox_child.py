"""Runs one program under limits: `python -c … <order fd> <status fd> <result fd> <tests fd>`, started by `sandbox`.

Needs nothing but the standard library, and little of that, so that it starts in a hundredth of a second and sees no
installed package. The order is a dictionary written by `marshal` (which needs no import; it comes from the parent):

- limits, syscall_filter (bytes; None for no protection), readable (files and folders): the protection;
- prompt, program: source texts; name: the program's __name__; imports: whether it gets names that judges import;
- style: "stdin" (run the program), "calls" (then call its `function` on every one of `calls`), "tests" (a second
  process runs the tests, and asks the program for what they need), "same_process" (`tests` in the program's process).

Who says what to the parent: the status goes through a pipe that is closed before the program runs, so only our own
code can say "unprotected: …". Results of calls go through another: whatever the program itself writes there is
compared with what was expected, so that it says no more than a returned value does. The tests' result comes from the
process of the tests, of which the program's process has no descriptor.
"""

from __future__ import annotations

import ctypes
import marshal
import os
import resource
import struct
import sys

TYPE_CHECKING = False  # importing typing would take longer than all the rest
if TYPE_CHECKING:
    from typing import Any, NoReturn

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SIGKILL = 9
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_READ_FILE, _LANDLOCK_READ_DIR = 1 << 2, 1 << 3
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Number of file-system rights that a version of Landlock knows; 16 from version 5 on."""
_CLONE_NEWUSER = 0x10000000
_CAPABILITY_VERSION_3 = 0x20080522
_HIGHEST_USER = 0xFFFFFFF0

PASSED = b"passed"
"""What the process of the tests tells the parent once they have run to their end."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    return result


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit_resources(limits: dict[str, int]) -> None:
    """Limits that hold for root, too: CPU time, address space, sizes of files, open files, no core file."""
    cpu_s, memory = limits["cpu_s"], limits["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_threads(num_threads: int) -> bool:
    """Let this process have so many threads; the kernel counts them by user, so it becomes one of its own.

    Root takes a real user id that nobody has (files are opened by the effective one, which stays); others enter a user
    namespace, where counting starts anew. Both give up all capabilities, so that root is counted at all, and cannot
    look into processes that have more.

    Returns:
        False where neither is possible; `sandbox` then watches the number of threads.
    """
    limited = _take_a_user_of_its_own() if os.geteuid() == 0 else _libc.unshare(_CLONE_NEWUSER) == 0
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")
    if limited:
        resource.setrlimit(resource.RLIMIT_NPROC, (num_threads, num_threads))
    return limited


def _take_a_user_of_its_own() -> bool:
    """Set the real user id to one from the upper half of those that exist here."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [(int(line.split()[0]), int(line.split()[2])) for line in file]
    first, count = max(ranges)
    last = min(first + count - 1, _HIGHEST_USER)
    user = last - os.getpid() % max(min(count // 2, 1 << 22), 1)
    return user > 0 and _libc.setresuid(user, -1, -1) == 0


def restrict_files(readable: list[str]) -> None:
    """Leave only these files and folders readable, where the kernel has Landlock; nothing is writable in any case."""
    version = _call(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return
    rights = (1 << _LANDLOCK_RIGHTS.get(version, 16)) - 1
    rules = _checked(
        _call(_LANDLOCK_CREATE_RULESET, struct.pack("=Q", rights), ctypes.c_size_t(8), ctypes.c_uint32(0)), "landlock"
    )
    for path in readable:
        allowed = _LANDLOCK_READ_FILE | (_LANDLOCK_READ_DIR if os.path.isdir(path) else 0)
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, fd)
        _checked(_call(_LANDLOCK_ADD_RULE, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0)), "landlock")
        os.close(fd)
    _checked(_call(_LANDLOCK_RESTRICT_SELF, ctypes.c_int(rules), ctypes.c_uint32(0)), "landlock")
    os.close(rules)


def install_filter(program: bytes) -> None:
    """Install a seccomp filter for good; it holds for threads and cannot be taken off."""
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a count, padding, a pointer.
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def protect(order: dict[str, Any]) -> str:
    """Put the limits and the filter in place, in the order in which each is still possible.

    Returns:
        Who limits the threads: "kernel", or "parent" where the kernel cannot.

    Raises:
        OSError: if the kernel refuses one of them.
    """
    protected = order["syscall_filter"] is not None
    limited = protected and limit_threads(order["limits"]["threads"])
    # After the change of user, which resets both. Memory that others of this user cannot read keeps the tests from the
    # program where there is no Landlock, too.
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    limit_resources(order["limits"])
    if protected:
        _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        restrict_files(order["readable"])
        install_filter(order["syscall_filter"])
    return "kernel" if limited else "parent"


def protect_and_report(order: dict[str, Any], status_fd: int) -> None:
    """Protect this process, tell the parent how that went, and close the way to tell it; ends the process if it failed.

    The status: "unprotected: REASON", or who limits the threads and the process's number.
    """
    try:
        limiter = protect(order)
    except OSError as error:
        os.write(status_fd, f"unprotected: {error}".encode())
        os._exit(1)
    os.write(status_fd, f"{limiter} {os.getpid()}\n".encode())
    os.close(status_fd)


def main() -> None:
    """Entry point; arguments as in the module's first line."""
    order_fd, status_fd, result_fd, tests_fd = map(int, sys.argv[1:5])
    with open(order_fd, "rb") as file:
        order = marshal.load(file)
    os.environ.clear()
    sys.argv = ["solution.py"]
    # Before the protection, under which neither this package's files nor the null device can be opened.
    from megatron_fipo.verifiers import sandbox_program

    sandbox_program.prepare()
    if order["style"] == "tests":
        _run_tests_apart(order, status_fd, result_fd, tests_fd)
    os.close(tests_fd)
    if order["style"] == "stdin":
        os.close(result_fd)
    protect_and_report(order, status_fd)
    module = sandbox_program.run(order)
    if order["style"] == "calls":
        sandbox_program.call_function(module, order, result_fd)
    elif order["style"] == "same_process":
        sandbox_program.run_tests(module, order["tests"])
        os.write(result_fd, PASSED)
        os._exit(0)  # whatever threads and exit handlers the program left behind


def _run_tests_apart(order: dict[str, Any], status_fd: int, result_fd: int, tests_fd: int) -> NoReturn:
    """Run the program in a new process, and the tests in this one, with two pipes between them."""
    from megatron_fipo.verifiers import sandbox_objects, sandbox_program, sandbox_tests
    from megatron_fipo.verifiers.sandbox_values import ProtocolError

    requests_read, requests_write = os.pipe()
    replies_read, replies_write = os.pipe()
    tests_pid = os.getpid()
    if os.fork() == 0:
        for fd in (result_fd, tests_fd, requests_write, replies_read):
            os.close(fd)
        protect_and_report(order, status_fd)
        if os.getppid() != tests_pid:
            os._exit(1)  # it ended before its death could take this process along
        try:
            sandbox_objects.serve(sandbox_program.run(order), requests_read, replies_write)
        finally:
            os._exit(1)
    for fd in (requests_read, replies_write):
        os.close(fd)
    protect_and_report(order, status_fd)
    with open(tests_fd, "rb") as file:
        tests = marshal.load(file)
    try:
        passed = sandbox_tests.run(tests, replies_read, requests_write)
    except ProtocolError:
        os._exit(0)
    if passed:
        os.write(result_fd, PASSED)
    os._exit(not passed)
