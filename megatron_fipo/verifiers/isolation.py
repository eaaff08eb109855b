"""How each verifier is isolated from the trainer, by its name.

| kind | verifiers | environment | a response is judged | the worker may |
|---|---|---|---|---|
| COMPUTING | math, exact, chain_arithmetic | allow-list | in one process for all | compute, read Python's files |
| EVALUATING | reasoning_gym | allow-list | in a forked process, if its scorer does more than compute | the same |
| OWN | package.module:function | allow-list | in a forked process | the same, and read its module's folder |
| PROGRAMS | code, code_unprotected | allow-list | by programs that it starts in `sandbox` | do what the user may |
| REMOTE | the URL of a reward model | allow-list, proxies | by a server | reach servers, write no file |
| TRUSTED | those in `verifier.trusted` | the trainer's | in one process for all | do what the user may |

Unless it is trusted, a verifier judges many responses in one process only where no response can run as code. The
COMPUTING ones run under `expressions_only`, since mathematics evaluates expressions.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import megatron_fipo
from megatron_fipo.verifiers.confinement import has_landlock
from megatron_fipo.verifiers.names import BUILTIN_VERIFIERS
from megatron_fipo.verifiers.registry import FOLDERS_VARIABLE


class Isolation(Enum):
    """The kinds of the table in this module's docstring; each kind has processes of its own."""

    COMPUTING = "computing"
    EVALUATING = "evaluating"
    OWN = "own"
    PROGRAMS = "programs"
    REMOTE = "remote"
    TRUSTED = "trusted"

    @property
    def is_forked(self) -> bool:
        """Whether the worker forks: for every response (OWN), or for those whose scorer does more than compute."""
        return self in (Isolation.EVALUATING, Isolation.OWN)


@dataclass(frozen=True)
class WorkerSetup:
    """The settings of a worker.

    Attributes:
        verifiers: names of the verifiers to import.
        isolation: their kind.
        timeout_s: longest time for one response.
        memory_gib: largest address space of the process.
    """

    verifiers: tuple[str, ...]
    isolation: Isolation
    timeout_s: float
    memory_gib: float


_BUILTIN = {
    "chain_arithmetic": Isolation.COMPUTING,
    "code": Isolation.PROGRAMS,
    "code_unprotected": Isolation.PROGRAMS,
    "exact": Isolation.COMPUTING,
    "math": Isolation.COMPUTING,
    "math_answer": Isolation.COMPUTING,
    "math_boxed": Isolation.COMPUTING,
    "reasoning_gym": Isolation.EVALUATING,
}

_PASSED_ON = (
    "PATH", "HOME", "LANG", "LANGUAGE", "LC_ALL", "LC_CTYPE", "LC_NUMERIC", "LC_COLLATE", "TZ", "VIRTUAL_ENV",
    "CONDA_PREFIX", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "PYTHONHASHSEED", "PYTHONUTF8",
    "PYTHONDONTWRITEBYTECODE", "PYTHONPYCACHEPREFIX", "PYTHONUSERBASE", "PYTHONNOUSERSITE", "PYTHONWARNINGS",
    FOLDERS_VARIABLE,
)  # fmt: skip
"""Variables of the trainer's environment that every worker gets: the paths of Python and its packages, the locale."""

_PASSED_ON_TO_CLIENTS = (
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY",
    "SSL_CERT_FILE", "SSL_CERT_DIR",
)  # fmt: skip

_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def isolation_of(verifier: str, trusted: Collection[str] = ()) -> Isolation:
    """The kind of a verifier, by its name; a built-in verifier may also be named by its dotted path."""
    if verifier in trusted:
        return Isolation.TRUSTED
    if verifier.startswith(("http://", "https://")):
        return Isolation.REMOTE
    builtin = {path: name for name, path in BUILTIN_VERIFIERS.items()}.get(verifier, verifier)
    # A new built-in verifier that is missing in the table is isolated like one that evaluates text.
    return _BUILTIN.get(builtin, Isolation.EVALUATING if builtin in BUILTIN_VERIFIERS else Isolation.OWN)


def environment_of(isolation: Isolation, scratch: str) -> dict[str, str]:
    """A worker's environment variables: the allowed ones of the trainer, or all for a trusted verifier.

    Numerical libraries get one thread, and temporary files go to the folder `scratch`.
    """
    if isolation is Isolation.TRUSTED:
        environment = dict(os.environ)
    else:
        names = (*_PASSED_ON, *(_PASSED_ON_TO_CLIENTS if isolation is Isolation.REMOTE else ()))
        environment = {name: os.environ[name] for name in names if name in os.environ}
        environment.setdefault("PYTHONUSERBASE", site.getuserbase())
    python_path = [package_root(), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **environment,
        **dict.fromkeys(_ONE_THREAD, "1"),
        "PYTHONPATH": os.pathsep.join(python_path),
        "TMPDIR": scratch,
    }


def package_root() -> str:
    """The folder from which this package is imported."""
    return str(Path(megatron_fipo.__file__).parents[1])


def isolation_warnings(verifiers: Iterable[str], trusted: Collection[str]) -> list[str]:
    """Warnings about protection that this machine cannot give these verifiers."""
    confined = sorted(name for name in verifiers if isolation_of(name, trusted).is_forked)
    if not confined or not sys.platform.startswith("linux") or has_landlock():
        return []
    return [
        f"this kernel has no Landlock, so that the processes of {', '.join(confined)} can read files, and in /proc the "
        "environment and memory of this run; they can neither write files nor reach the network"
    ]
