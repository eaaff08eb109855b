"""Which code a run ran."""

from __future__ import annotations

import json
import platform
import re
import socket
import subprocess
from pathlib import Path

import pytest

from megatron_fipo import __version__
from megatron_fipo.metrics import provenance
from megatron_fipo.metrics.provenance import run_provenance, save_provenance


def make_repository(folder: Path) -> Path:
    """A repository with one commit of a package; returns the package's folder."""
    package = folder / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    identity = ["-c", "user.name=Tester", "-c", "user.email=tester@example.com"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "-m", "Start"]):
        subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)
    return package


def test_revision_and_dirty_flag(tmp_path: Path) -> None:
    package = make_repository(tmp_path)
    head = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    state = run_provenance(package)["git"]
    assert state == {"revision": head.stdout.strip(), "dirty": False, "reason": None}
    assert re.fullmatch(r"[0-9a-f]{40}", state["revision"])
    (package / "__init__.py").write_text("changed = True\n")
    assert run_provenance(package)["git"]["dirty"] is True


def test_a_new_file_makes_it_dirty(tmp_path: Path) -> None:
    package = make_repository(tmp_path)
    (package / "new.py").write_text("")
    assert run_provenance(package)["git"]["dirty"] is True


def test_an_installed_copy_has_no_revision_of_the_repository_around_it(tmp_path: Path) -> None:
    make_repository(tmp_path)
    (tmp_path / ".gitignore").write_text("venv/\n")
    installed = tmp_path / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    state = run_provenance(installed)["git"]
    assert state["revision"] is None
    assert state["dirty"] is None
    assert "git knows no revision of package" in state["reason"]


def test_no_repository_and_no_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert "not a git repository" in run_provenance(tmp_path)["git"]["reason"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_provenance(tmp_path)["git"]["reason"] == "git is not installed"


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    versions = run_provenance()["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]  # metadata may lack the +cu130
    assert versions["megatron_fipo"] == __version__
    assert re.match(r"0\.\d+\.\d+", versions["megatron-core"])
    monkeypatch.setattr(provenance, "PACKAGES", ("no-such-package-here",))
    assert run_provenance()["versions"]["no-such-package-here"] is None


def test_saved_as_json_without_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((socket, "gethostname"), (socket, "getfqdn"), (platform, "node")):
        monkeypatch.setattr(module, name, lambda *_: "name-of-this-host")
    monkeypatch.setenv("HOSTNAME", "name-of-this-host")
    path = save_provenance(tmp_path / "run")
    assert path == tmp_path / "run" / "provenance.json"
    assert json.loads(path.read_text()) == run_provenance()
    assert "name-of-this-host" not in path.read_text()
