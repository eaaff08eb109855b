"""The documentation's generated parts are what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_configuration_reference_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools/docs/config_reference.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0, run.stderr
