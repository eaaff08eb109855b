"""Runs one program under limits: `python -c … <order fd> <status fd> <result fd> <tests fd>`, started by `sandbox`.

It needs only a small part of the standard library, so that it starts in a hundredth of a second and sees no installed
package. The order comes from the parent, as a dictionary written by `marshal`, which is built into the interpreter:

- limits, syscall_filter (bytes; None for no protection), readable (files and folders): the protection;
- prompt, program: source texts; name: the program's __name__; imports: whether it gets names that judges import;
- style: "stdin" (run the program), "calls" (then call its `function` with each of `calls`), "tests" (a second process
  runs the tests, and asks the program's for what they need), "same_process" (run `tests` in the program's process).

The status goes to the parent through a pipe that is closed before the program runs, so only our own code can write
"unprotected: …". Results of calls go through another pipe. The program could write to it, but everything there is
compared with the expected results, so this gains no more than a returned value. The result of tests comes from the
tests' process through the second pipe, which is closed in the program's process.
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
"""Number of file-system rights by version of Landlock; 16 from version 5 on."""
_CLONE_NEWUSER = 0x10000000
_CAPABILITY_VERSION_3 = 0x20080522
_HIGHEST_USER = 0xFFFFFFF0

PASSED = b"passed"
"""What the tests' process writes to the parent once all tests have passed."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    result: int = _libc.syscall(ctypes.c_long(number), *arguments)
    return result


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def limit_resources(limits: dict[str, int]) -> None:
    """Limit CPU time, address space, sizes of files and open files, and forbid core dumps; this holds for root, too."""
    cpu_s, memory = limits["cpu_s"], limits["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def limit_threads(num_threads: int) -> bool:
    """Limit this process to `num_threads` threads. The kernel counts per user, so the process takes a user of its own.

    Root takes a real user id that nobody has; the effective id, which decides about files, stays. Other users enter a
    user namespace, where counting starts anew. Both give up all capabilities: the limit does not hold for a process
    with capabilities, and one without them cannot inspect processes that have more.

    Returns:
        Whether the kernel limits the threads; if not, `sandbox` watches their number.
    """
    limited = _take_a_user_of_its_own() if os.geteuid() == 0 else _libc.unshare(_CLONE_NEWUSER) == 0
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _checked(_libc.capset(header, bytes(24)), "capset")
    if limited:
        resource.setrlimit(resource.RLIMIT_NPROC, (num_threads, num_threads))
    return limited


def _take_a_user_of_its_own() -> bool:
    """Set the real user id to one from the upper half of the ids in this user namespace; returns whether it worked."""
    with open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [(int(line.split()[0]), int(line.split()[2])) for line in file]
    first, count = max(ranges)
    last = min(first + count - 1, _HIGHEST_USER)
    user = last - os.getpid() % max(min(count // 2, 1 << 22), 1)
    return user > 0 and _libc.setresuid(user, -1, -1) == 0


def restrict_files(readable: list[str]) -> None:
    """Make all other files and folders unreadable, and all unwritable; does nothing if the kernel has no Landlock."""
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
    """Install a seccomp filter, which new threads inherit and which cannot be removed."""
    buffer = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: a count, padding, a pointer.
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
    _checked(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0), "seccomp")


def protect(order: dict[str, Any]) -> str:
    """Apply the limits and the filter, in an order in which each step is still allowed.

    Returns:
        Who limits the threads: "kernel", or "parent" if the kernel cannot.

    Raises:
        OSError: if the kernel refuses one of them.
    """
    protected = order["syscall_filter"] is not None
    limited = protected and limit_threads(order["limits"]["threads"])
    # After the change of user, which resets both. PR_SET_DUMPABLE 0 hides the memory from other processes of this user,
    # and so the tests from the program, even without Landlock.
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    _checked(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")
    limit_resources(order["limits"])
    if protected:
        _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        restrict_files(order["readable"])
        install_filter(order["syscall_filter"])
    return "kernel" if limited else "parent"


def protect_and_report(order: dict[str, Any], status_fd: int) -> None:
    """Protect this process, write the status to the parent and close its pipe; ends the process if protecting failed.

    The status is "unprotected: REASON", or who limits the threads ("kernel" or "parent") and the process id.
    """
    try:
        limiter = protect(order)
    except OSError as error:
        os.write(status_fd, f"unprotected: {error}".encode())
        os._exit(1)
    os.write(status_fd, f"{limiter} {os.getpid()}\n".encode())
    os.close(status_fd)


def main() -> None:
    """Entry point; the module's first line shows the arguments."""
    order_fd, status_fd, result_fd, tests_fd = map(int, sys.argv[1:5])
    with open(order_fd, "rb") as file:
        order = marshal.load(file)
    os.environ.clear()
    sys.argv = ["solution.py"]
    # Before the protection, under which this package's files and the null device cannot be opened.
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
        os._exit(0)  # ignores threads and exit handlers that the program left behind


def _run_tests_apart(order: dict[str, Any], status_fd: int, result_fd: int, tests_fd: int) -> NoReturn:
    """Run the program in a forked process and the tests in this one, with two pipes between them."""
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
            os._exit(1)  # the parent ended before PR_SET_PDEATHSIG was set
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
