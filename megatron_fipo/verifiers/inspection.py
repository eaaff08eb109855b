"""Looks at verifiers before anything is generated, in a process apart: what is a user's own never runs in the trainer.

    echo '["judges:verify"]' | python -m megatron_fipo.verifiers.inspection

prints {verifier: {"problem": why it cannot be used, else "", "doubt": …, "wants_row": …}}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import megatron_fipo
from megatron_fipo.verifiers.asking import writable
from megatron_fipo.verifiers.registry import load_verifier, shown_name

TIMEOUT_S = 120.0
"""Longest time for importing all verifiers of a run."""

_MAX_SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Inspection:
    """The findings about one verifier.

    Attributes:
        problem: why it cannot be used; empty if it can.
        doubt: what may be a slip; empty if nothing.
        wants_row: whether it asks for the rows of the data.
    """

    problem: str = ""
    doubt: str = ""
    wants_row: bool = False


def inspect_verifiers(names: Sequence[str]) -> dict[str, Inspection]:
    """Import verifiers in a process of their own and say of each what it is like. Nothing is raised, nothing hangs."""
    package_root = str(Path(megatron_fipo.__file__).parents[1])
    python_path = os.pathsep.join(path for path in (package_root, os.environ.get("PYTHONPATH", "")) if path)
    try:
        run = subprocess.run(
            [sys.executable, "-m", "megatron_fipo.verifiers.inspection"],
            input=json.dumps(list(names)).encode(),  # not on the command line, which others can read
            capture_output=True,
            check=False,
            timeout=TIMEOUT_S,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        return _all_alike(names, f"importing took longer than {TIMEOUT_S:g} s")
    lines = run.stdout.decode(errors="replace").splitlines()
    try:
        return {name: Inspection(**found) for name, found in json.loads(lines[-1]).items()}
    except (IndexError, ValueError, TypeError, AttributeError):
        said = run.stderr.decode(errors="replace").strip()[-_MAX_SHOWN_CHARACTERS:]
        ended = f"exit code {run.returncode}" if run.returncode >= 0 else f"signal {-run.returncode}"
        return _all_alike(names, f"the process that imports it ended ({ended}). {said}".strip())


def _all_alike(names: Sequence[str], problem: str) -> dict[str, Inspection]:
    """One process looked at all: only one verifier can be named with certainty."""
    return {name: Inspection(f"verifier {shown_name(name)}: {problem}") for name in names}


def _inspect(name: str) -> Inspection:
    try:
        verifier = load_verifier(name)
    except (ImportError, ValueError) as error:
        return Inspection(writable(str(error)))
    return Inspection("", writable(getattr(verifier, "hint", "")), bool(getattr(verifier, "wants_row", False)))


def main() -> None:
    """Entry point; names of verifiers on standard input."""
    names = json.load(sys.stdin)
    # What a user's module prints when it is imported must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = {name: asdict(_inspect(name)) for name in names}
    answer.write(json.dumps(found) + "\n")
    answer.close()


if __name__ == "__main__":
    main()
    os._exit(0)  # whatever threads a user's module has started
