"""Runs one program under limits: python sandbox_child.py <spec fd> <tests fd> <result fd>, started by `sandbox`.

Needs nothing but the standard library, so that it starts in a hundredth of a second and sees no installed package.

The spec is a JSON object: program (source), has_tests, limits, syscall_filter (base64; null for no protection) and
readable (folders). The tests are a JSON object (source, token), read when the program has run; the token goes to the
result once they have. A result that begins with "unprotected:" says why the program was not run.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446
_LANDLOCK_READ = 1 << 2 | 1 << 3
_LANDLOCK_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}
"""Number of file-system rights that a version of Landlock knows; 16 from version 5 on."""

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


def restrict_files(readable: list[str]) -> None:
    """Leave only these folders readable, where the kernel has Landlock; nothing is writable with or without it."""
    version = _call(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return
    rights = (1 << _LANDLOCK_RIGHTS.get(version, 16)) - 1
    rules = _checked(
        _call(_LANDLOCK_CREATE_RULESET, struct.pack("=Q", rights), ctypes.c_size_t(8), ctypes.c_uint32(0)), "landlock"
    )
    for folder in readable:
        fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", _LANDLOCK_READ, fd)
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


def protect(spec: dict[str, Any]) -> None:
    """Put the limits and the filter in place, in the order in which each is still possible.

    Raises:
        OSError: if the kernel refuses one of them.
    """
    _checked(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    limit_resources(spec["limits"])
    if spec["syscall_filter"] is not None:
        _checked(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
        restrict_files(spec["readable"])
        install_filter(base64.b64decode(spec["syscall_filter"]))


def main() -> None:
    """Entry point; arguments as in the module's first line."""
    spec_fd, tests_fd, result_fd = map(int, sys.argv[1:4])
    with open(spec_fd, encoding="utf-8") as file:
        spec = json.load(file)
    os.environ.clear()
    sys.argv = ["solution.py"]
    try:
        protect(spec)
    except OSError as error:
        os.write(result_fd, f"unprotected: {error}".encode())
        os._exit(1)
    namespace = {"__name__": "solution" if spec["has_tests"] else "__main__", "__builtins__": __builtins__}
    exec(compile(spec["program"], "solution.py", "exec"), namespace)
    if spec["has_tests"]:
        with open(tests_fd, encoding="utf-8") as file:
            tests = json.load(file)
        exec(compile(tests["source"], "tests.py", "exec"), namespace)
        os.write(result_fd, tests["token"].encode())
        os._exit(0)  # whatever threads and exit handlers the program left behind


if __name__ == "__main__":
    main()
