"""Imports verifiers in a separate process and reports on them, so that a user's code never runs in the trainer.

    echo '["judges:verify"]' | python -m megatron_fipo.verifiers.inspection

prints a JSON object of `Inspection` by verifier: {"judges:verify": {"problem": "", "doubt": "", "wants_row": false}}.
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
"""Longest time for importing all own verifiers of a run."""

_MAX_SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Inspection:
    """The findings about one verifier.

    Attributes:
        problem: why it cannot be used; empty if it can.
        doubt: a likely mistake in it; empty if there is none.
        wants_row: whether it takes the row of the data.
    """

    problem: str = ""
    doubt: str = ""
    wants_row: bool = False


def inspect_verifiers(names: Sequence[str]) -> dict[str, Inspection]:
    """Import verifiers in one separate process and report on each. A failure or time-out becomes a problem of each."""
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
        return _same_for_all(names, f"importing took longer than {TIMEOUT_S:g} s")
    lines = run.stdout.decode(errors="replace").splitlines()
    try:
        return {name: Inspection(**found) for name, found in json.loads(lines[-1]).items()}
    except (IndexError, ValueError, TypeError, AttributeError):
        said = run.stderr.decode(errors="replace").strip()[-_MAX_SHOWN_CHARACTERS:]
        ended = f"exit code {run.returncode}" if run.returncode >= 0 else f"signal {-run.returncode}"
        return _same_for_all(names, f"the process that imports it ended ({ended}). {said}".strip())


def _same_for_all(names: Sequence[str], problem: str) -> dict[str, Inspection]:
    """Report a problem of the process for every verifier, since it does not show which of them caused it."""
    return {name: Inspection(f"verifier {shown_name(name)}: {problem}") for name in names}


def _inspect(name: str) -> Inspection:
    try:
        verifier = load_verifier(name)
    except (ImportError, ValueError) as error:
        return Inspection(writable(str(error)))
    return Inspection("", writable(getattr(verifier, "hint", "")), bool(getattr(verifier, "wants_row", False)))


def main() -> None:
    """Entry point; reads a JSON list of verifiers' names from standard input."""
    names = json.load(sys.stdin)
    # Output that a user's module prints on import must not mix with the answer.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    found = {name: asdict(_inspect(name)) for name in names}
    answer.write(json.dumps(found) + "\n")
    answer.close()


if __name__ == "__main__":
    main()
    os._exit(0)  # does not wait for threads that a user's module has started
