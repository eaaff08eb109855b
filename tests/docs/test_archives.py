"""The archives for a package index: they build, are well-formed, and hold what they must."""

from __future__ import annotations

import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MEGATRON_FIPO_DOCS_PYTHON", "")
pytestmark = pytest.mark.docs


def run(folder: Path, *arguments: str) -> None:
    """Run a command of the documentation's environment."""
    assert PYTHON, "MEGATRON_FIPO_DOCS_PYTHON names no Python; run make test-docs"
    python = ROOT / PYTHON
    command = [str(python.with_name(arguments[0])), *arguments[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the source archive, and the wheel built from it and from nothing else."""
    folder = tmp_path_factory.mktemp("archives")
    source = folder / "source"
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(source, "pyproject-build", "--no-isolation", "--outdir", str(folder / "dist"))
    return folder / "dist"


def test_the_source_archive_is_the_repository(archives: Path) -> None:
    (archive,) = archives.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert [name for name in tracked.splitlines() if (ROOT / name).is_file() and name not in names] == []


def test_the_wheel_has_the_whole_package_and_nothing_else(archives: Path) -> None:
    (wheel,) = archives.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "megatron_fipo"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    package = {name for name in tracked.splitlines() if (ROOT / name).is_file()}
    assert sorted(package - names) == []
    # What is copied into the package when it is built: examples for machines without a clone.
    assert [name for name in sorted(names - package) if not name.startswith("megatron_fipo/starters/")] == []


def test_an_index_would_take_them(archives: Path) -> None:
    run(archives, "twine", "check", "--strict", *map(str, archives.iterdir()))


def test_the_citation_is_valid() -> None:
    run(ROOT, "cffconvert", "--validate", "--infile", "CITATION.cff")
