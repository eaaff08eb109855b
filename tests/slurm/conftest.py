"""The cluster under test and NeMo-Run's environment, each made where it is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian import install_packages
from tests.slurm.cluster import PACKAGES, Cluster, missing_programs, running_cluster

INSTALLER = Path(__file__).parents[2] / "tools" / "engines" / "install.py"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Slurm of two nodes on this host."""
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs for other users, so it must be started by root")
    install_packages(*PACKAGES, unless=lambda: not missing_programs())
    with running_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def nemo_run_python() -> str:
    """Python of the environment that holds NeMo-Run; it is installed where it is missing, in a few minutes."""
    command = [sys.executable, str(INSTALLER), "nemo-run"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
