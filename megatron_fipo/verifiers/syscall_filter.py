"""A seccomp filter that allows a list of system calls to a judged program and refuses all others.

It allows what the Python interpreter needs to compute, to read files, to write to open files, and to run asyncio's
event loop: pipes, epoll, and pairs of connected sockets, which reach only each other. It refuses other sockets (unless
`sockets` is set), new processes, signals to other processes, opening files for writing, and changes of limits other
than the stack's, for root as well.
"""

from __future__ import annotations

import errno
import platform
import struct
from dataclasses import dataclass

_X86_64 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8, "mmap": 9,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "readv": 19, "writev": 20, "access": 21, "select": 23, "sched_yield": 24, "mremap": 25, "pipe": 22,
    "madvise": 28, "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37, "setitimer": 38,
    "getpid": 39, "recvfrom": 45, "shutdown": 48, "getsockname": 51, "getpeername": 52, "getsockopt": 55, "exit": 60,
    "uname": 63, "getcwd": 79, "readlink": 89, "gettimeofday": 96, "getrlimit": 97, "getrusage": 98, "sysinfo": 99,
    "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108, "getppid": 110, "getpgrp": 111,
    "getgroups": 115, "getresuid": 118, "getresgid": 120, "getpgid": 121, "getsid": 124, "sigaltstack": 131,
    "arch_prctl": 158, "gettid": 186, "futex": 202, "sched_getaffinity": 204, "epoll_create": 213, "getdents64": 217,
    "set_tid_address": 218, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "newfstatat": 262, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281, "eventfd2": 290, "epoll_create1": 291,
    "dup3": 292, "pipe2": 293, "getrandom": 318, "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "eventfd2": 19, "epoll_create1": 20, "epoll_ctl": 21, "epoll_pwait": 22, "dup": 23, "dup3": 24,
    "faccessat": 48, "close": 57, "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65,
    "writev": 66, "pread64": 67, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80,
    "exit": 93, "exit_group": 94, "set_tid_address": 96, "futex": 98, "set_robust_list": 99, "nanosleep": 101,
    "getitimer": 102, "setitimer": 103, "clock_gettime": 113, "clock_getres": 114, "clock_nanosleep": 115,
    "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128, "sigaltstack": 132, "rt_sigaction": 134,
    "rt_sigprocmask": 135, "rt_sigreturn": 139, "getresuid": 148, "getresgid": 150, "times": 153, "getpgid": 155,
    "getsid": 156, "getgroups": 158, "uname": 160, "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getppid": 173,
    "getuid": 174, "geteuid": 175, "getgid": 176, "getegid": 177, "gettid": 178, "sysinfo": 179, "getsockname": 204,
    "getpeername": 205, "recvfrom": 207, "getsockopt": 209, "shutdown": 210, "brk": 214, "munmap": 215, "mremap": 216,
    "mmap": 222, "mprotect": 226, "madvise": 233, "getrandom": 278, "membarrier": 283, "statx": 291, "rseq": 293,
    "faccessat2": 439,
}  # fmt: skip


@dataclass(frozen=True)
class _Architecture:
    """System calls by name on one processor: those always allowed, and those allowed for some arguments."""

    audit_number: int
    always: dict[str, int]
    conditional: dict[str, int]


_X86_64_CONDITIONAL = {
    "open": 2, "ioctl": 16, "sendto": 44, "socketpair": 53, "clone": 56, "fcntl": 72, "openat": 257, "prlimit64": 302,
    "clone3": 435,
}  # fmt: skip
_AARCH64_CONDITIONAL = {
    "fcntl": 25, "ioctl": 29, "openat": 56, "socketpair": 199, "sendto": 206, "clone": 220, "prlimit64": 261,
    "clone3": 435,
}  # fmt: skip
_ARCHITECTURES = {
    "x86_64": _Architecture(0xC000003E, _X86_64, _X86_64_CONDITIONAL),
    "aarch64": _Architecture(0xC00000B7, _AARCH64, _AARCH64_CONDITIONAL),
}

_SOCKETS = {
    "x86_64": {
        "socket": 41, "connect": 42, "sendto": 44, "recvfrom": 45, "sendmsg": 46, "recvmsg": 47, "shutdown": 48,
        "bind": 49, "getsockname": 51, "getpeername": 52, "setsockopt": 54, "getsockopt": 55, "recvmmsg": 299,
        "sendmmsg": 307,
    },
    "aarch64": {
        "socket": 198, "bind": 200, "connect": 203, "getsockname": 204, "getpeername": 205, "sendto": 206,
        "recvfrom": 207, "setsockopt": 208, "getsockopt": 209, "shutdown": 210, "sendmsg": 211, "recvmsg": 212,
        "recvmmsg": 243, "sendmmsg": 269,
    },
}  # fmt: skip
"""Further calls that a client needs: to resolve a name, to connect, to send and to receive."""

_LOAD, _EQUALS, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _AUDIT_NUMBER, _ARGUMENTS = 0, 4, 16
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_FIRST_X32_CALL = 0x40000000
_WRITES = 0o1 | 0o2 | 0o100 | 0o1000 | 0o2000 | 0o20000000  # O_WRONLY O_RDWR O_CREAT O_TRUNC O_APPEND O_TMPFILE
_NEW_THREAD = 0x00010000
_NEW_NAMESPACES = 0x7E020000
_FCNTL_COMMANDS = (0, 1, 2, 3, 1030)  # F_DUPFD F_GETFD F_SETFD F_GETFL F_DUPFD_CLOEXEC; F_SETOWN would send signals
_F_SETFL = 4
_O_ASYNC = 0o20000
_RLIMIT_STACK = 3
_FIONBIO = 0x5421
_SOCKET_IOCTLS = (_FIONBIO, 0x541B)  # and FIONREAD
_AF_UNIX = 1
_STREAM_SOCKETS = (0o1, 0o4001, 0o2000001, 0o2004001)  # SOCK_STREAM with SOCK_NONBLOCK, SOCK_CLOEXEC or both


class SandboxUnavailableError(RuntimeError):
    """Programs cannot be confined on this machine."""


def syscall_filter(*, threads: bool = True, sockets: bool = False) -> bytes:
    """Make the filter for this machine, as an array of the kernel's struct sock_filter.

    Args:
        threads: whether new threads may be started; a filter cannot limit their number.
        sockets: whether the process may connect to servers.

    Raises:
        SandboxUnavailableError: on systems other than Linux, or processors other than x86_64 and aarch64.
    """
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _ARCHITECTURES:
        raise SandboxUnavailableError(
            f"judged programs can be confined only by Linux on {' and '.join(_ARCHITECTURES)}, and this is "
            f"{platform.system()} on {machine}"
        )
    architecture = _ARCHITECTURES[machine]
    program = [
        _step(_LOAD, _AUDIT_NUMBER),
        _step(_EQUALS, architecture.audit_number, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":  # the x32 ABI, which has other numbers for the same calls
        program += [_step(_AT_LEAST, _FIRST_X32_CALL, 0, 1), _step(_RETURN, _KILL)]
    always = {**architecture.always, **(_SOCKETS[machine] if sockets else {})}
    for number in always.values():
        program += [_step(_EQUALS, number, 0, 1), _step(_RETURN, _ALLOW)]
    for name, number in architecture.conditional.items():
        rule = _rule(name, threads, sockets)
        program += [_step(_EQUALS, number, 0, len(rule)), *rule]
    return b"".join([*program, _refuse(errno.EPERM)])


def _rule(name: str, threads: bool, sockets: bool) -> list[bytes]:
    """The filter's instructions after a call of this name was recognized; every path through them returns."""
    if name in ("open", "openat"):
        return [
            _load_argument(1 if name == "open" else 2),
            _step(_ANY_BIT, _WRITES, 0, 1),
            _refuse(errno.EACCES),
            _step(_RETURN, _ALLOW),
        ]
    if name == "clone":
        if not threads:
            return [_refuse(errno.EPERM)]
        return [
            _load_argument(0),
            _step(_ANY_BIT, _NEW_NAMESPACES, 2, 0),
            _step(_ANY_BIT, _NEW_THREAD, 0, 1),
            _step(_RETURN, _ALLOW),
            _refuse(errno.EPERM),
        ]
    if name == "prlimit64":  # to read limits, and to set its own stack's, which programs with deep recursion raise
        return [
            _load_argument(2),
            _step(_EQUALS, 0, 0, 2),
            _load_argument(2, high=True),
            _step(_EQUALS, 0, 4, 0),
            _load_argument(0),
            _step(_EQUALS, 0, 0, 3),
            _load_argument(1),
            _step(_EQUALS, _RLIMIT_STACK, 0, 1),
            _step(_RETURN, _ALLOW),
            _refuse(errno.EPERM),
        ]
    if name == "fcntl":
        commands = [
            _step(_EQUALS, command, len(_FCNTL_COMMANDS) - i + 3, 0) for i, command in enumerate(_FCNTL_COMMANDS)
        ]
        return [
            _load_argument(1),
            *commands,
            _step(_EQUALS, _F_SETFL, 0, 2),  # for O_NONBLOCK; O_ASYNC would send signals
            _load_argument(2),
            _step(_ANY_BIT, _O_ASYNC, 0, 1),
            _refuse(errno.EPERM),
            _step(_RETURN, _ALLOW),
        ]
    if name == "ioctl":
        requests = _SOCKET_IOCTLS if sockets else (_FIONBIO,)
        allowed = [_step(_EQUALS, request, len(requests) - i, 0) for i, request in enumerate(requests)]
        return [_load_argument(1), *allowed, _refuse(errno.ENOTTY), _step(_RETURN, _ALLOW)]
    if name == "socketpair":  # a pair of datagram sockets could send to the address of a third one
        types = [_step(_EQUALS, kind, len(_STREAM_SOCKETS) - i, 0) for i, kind in enumerate(_STREAM_SOCKETS)]
        return [
            _load_argument(0),
            _step(_EQUALS, _AF_UNIX, 0, len(types) + 1),
            _load_argument(1),
            *types,
            _refuse(errno.EPERM),
            _step(_RETURN, _ALLOW),
        ]
    if name == "sendto":  # only without an address: to the other end of a pair
        return [
            _load_argument(4),
            _step(_EQUALS, 0, 0, 3),
            _load_argument(4, high=True),
            _step(_EQUALS, 0, 0, 1),
            _step(_RETURN, _ALLOW),
            _refuse(errno.EPERM),
        ]
    assert name == "clone3", name
    return [_refuse(errno.ENOSYS)]  # its flags are in memory, which a filter cannot read; libc falls back to clone


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refuse(number: int) -> bytes:
    return _step(_RETURN, _ERRNO | number)


def _load_argument(index: int, high: bool = False) -> bytes:
    return _step(_LOAD, _ARGUMENTS + 8 * index + (4 if high else 0))
