"""Programs that tests need of Debian, installed where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest


def install_packages(*packages: str) -> None:
    """Install packages by apt-get, as root; the test is skipped, with the reason, where that cannot be."""
    names = ", ".join(packages)
    if os.geteuid() != 0:
        pytest.skip(f"{names} not installed, and only root can install them")
    if shutil.which("apt-get") is None:
        pytest.skip(f"{names} not installed, and there is no apt-get to install them with")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *packages]):
        subprocess.run(["apt-get", *command], env=environment, check=True, stdout=subprocess.DEVNULL)
