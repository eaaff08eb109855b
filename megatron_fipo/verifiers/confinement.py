"""Confines this process irrevocably, once its imports are done: what it may read, which system calls it may make.

A process with all restrictions, root or not, in a container or not, has no network, starts no processes or threads,
neither signals other processes nor sees their memory, and writes only to files that are already open. Where the kernel
has Landlock (5.13), it reads only the files of Python, of PYTHONPATH and of the verifiers. `worker` and `isolation` say
which worker gets which restrictions. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import resource
import site
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from megatron_fipo.verifiers.registry import FOLDERS_VARIABLE
from megatron_fipo.verifiers.sandbox_child import install_filter, restrict_files
from megatron_fipo.verifiers.syscall_filter import SandboxUnavailableError

_SYSTEM_FOLDERS = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
_PR_SET_NO_NEW_PRIVS = 38
_LANDLOCK_CREATE_RULESET, _LANDLOCK_GIVE_VERSION = 444, 1
_MAX_OPEN_FILES = 256


def has_landlock() -> bool:
    """Whether the kernel can restrict which files a process reads."""
    libc = ctypes.CDLL(None)
    version = libc.syscall(
        ctypes.c_long(_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), ctypes.c_uint32(_LANDLOCK_GIVE_VERSION)
    )
    return int(version) >= 1


def readable_folders(modules: Iterable[str], package_root: str) -> list[str]:
    """List the folders that a confined worker may read: Python's installation, PYTHONPATH, and those of these modules.

    The current folder, the folder from which this project is imported and the configuration's folder are left out,
    because a run's outputs, data and notes lie there. If one of the modules lies directly in such a folder, the whole
    folder is readable nevertheless.

    Args:
        modules: names of imported modules.
        package_root: folder from which this project is imported.
    """
    installed = {*site.getsitepackages(), site.getusersitepackages(), *sysconfig.get_paths().values()}
    beside = os.environ.get(FOLDERS_VARIABLE, "").split(os.pathsep)  # a configuration's folder
    kept_out = {os.path.realpath(path) for path in ("", package_root, *beside)}
    left_out = kept_out - {os.path.realpath(path) for path in installed}
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)[1:]  # the first one is package_root
    on_path = {path for path in sys.path if os.path.realpath(path) not in left_out}
    folders = {*installed, *on_path, *filter(None, named), *_SYSTEM_FOLDERS, f"{sys.base_prefix}/lib"}
    for name in (*modules, "megatron_fipo"):
        folders.update(_folders_of(name.partition(".")[0]))
    found = {os.path.realpath(folder) for folder in folders if os.path.isdir(folder)}
    return sorted(found - {"/"})


def _folders_of(module_name: str) -> list[str]:
    """The folders of an imported top-level module: a package's own, or the one that holds the module's file."""
    module = sys.modules[module_name]
    if hasattr(module, "__path__"):
        return list(module.__path__)
    return [str(Path(module.__file__).parent)] if module.__file__ else []


def limit_memory(memory_gib: float) -> None:
    """Limit the process's address space to `memory_gib` GiB; beyond it, Python raises MemoryError."""
    limit = int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_files() -> None:
    """Forbid this process to make files larger, to open more than `_MAX_OPEN_FILES`, and to leave a core dump."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = _MAX_OPEN_FILES if most == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, few))


def restrict_reading(readable: list[str]) -> None:
    """Make all other folders unreadable, to this process and its children; without Landlock, all stay readable.

    Args:
        readable: the folders that stay readable.

    Raises:
        SandboxUnavailableError: if the kernel has Landlock and refuses.
    """
    try:
        _gain_no_privileges()
        restrict_files(readable)
    except OSError as error:
        raise SandboxUnavailableError(f"the kernel refuses to restrict which files are read: {error}") from error


def restrict_calls(program: bytes) -> None:
    """Install a filter of system calls (`syscall_filter`) in this process; it cannot be removed.

    Raises:
        SandboxUnavailableError: if the kernel refuses.
    """
    try:
        _gain_no_privileges()
        install_filter(program)
    except OSError as error:
        raise SandboxUnavailableError(f"the kernel refuses to filter system calls: {error}") from error


def _gain_no_privileges() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
