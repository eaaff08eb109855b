"""Programs that tests need of Debian, installed where they are missing."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest


def install_packages(*packages: str, unless: Callable[[], bool]) -> None:
    """Install packages by apt-get, as root; the test is skipped, with the reason, where that cannot be.

    Args:
        unless: whether all is there already; asked again while no other process of the tests installs anything.
    """
    if unless():
        return
    names = ", ".join(packages)
    if os.geteuid() != 0:
        pytest.skip(f"{names} not installed, and only root can install them")
    if shutil.which("apt-get") is None:
        pytest.skip(f"{names} not installed, and there is no apt-get to install them with")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with (Path(tempfile.gettempdir()) / "megatron_fipo_tests_apt.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes, and apt-get in one at a time
        if unless():
            return
        for command in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", *packages]):
            subprocess.run(["apt-get", *command], env=environment, check=True, stdout=subprocess.DEVNULL)
