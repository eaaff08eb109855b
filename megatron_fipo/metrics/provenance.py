"""The code that a run used: its git revision, and the versions of the packages that numbers depend on."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_fipo import __version__
from megatron_fipo.system.disk import write_text_whole

PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "sglang", "vllm")
"""Packages whose versions are recorded, null where one is not installed."""


def run_provenance(package_folder: Path = Path(__file__).parents[1]) -> dict[str, Any]:
    """Collect the provenance; imports none of the packages it names and holds nothing about the machine.

    Args:
        package_folder: folder whose git revision is asked for; by default that of this package.

    Returns:
        `git`: the `revision` and whether the tree is `dirty` (changed or untracked files), or both None and the
        `reason`; `versions` by package.
    """
    return {
        "git": _git_state(package_folder),
        "versions": {
            "python": platform.python_version(),
            "megatron_fipo": __version__,
            **{name: _installed_version(name) for name in PACKAGES},
        },
    }


def save_provenance(folder: str | Path, origins: Mapping[str, Any] | None = None) -> Path:
    """Write `run_provenance()` to provenance.json in the run's folder, which is made if need be.

    Args:
        origins: further entries, which say where model and data came from, if from the hub.

    Raises:
        DiskError: if it cannot be written.
    """
    path = Path(folder) / "provenance.json"
    write_text_whole(path, json.dumps({**run_provenance(), **(origins or {})}, indent=2) + "\n")
    return path


def _git_state(folder: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        # An installed copy may lie in a user's repository (.venv/lib/...), whose revision says nothing about this code.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain")), "reason": None}
    except FileNotFoundError:
        reason = "git is not installed"
    except subprocess.TimeoutExpired:
        reason = "git did not answer within 30 s"
    except subprocess.CalledProcessError as error:
        reason = f"git knows no revision of {folder.name}: {(error.stderr.strip() or str(error)).splitlines()[0]}"
    return {"revision": None, "dirty": None, "reason": reason}


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
