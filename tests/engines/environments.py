"""Where the servers under test are installed.

`make test-engines` installs both and names their Pythons in the environment, so that nothing is skipped there. Without
those variables the installer's own environments are used where they exist; a test whose server is nowhere is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

INSTALLER = Path(__file__).resolve().parents[2] / "tools" / "engines" / "install.py"


def server_python(engine: str) -> Path:
    """Python of the environment that holds a server; skips the test where it is not installed.

    Args:
        engine: sglang or vllm.

    Raises:
        FileNotFoundError: if MEGATRON_FIPO_SGLANG_PYTHON or MEGATRON_FIPO_VLLM_PYTHON names what is not there.
    """
    variable = f"MEGATRON_FIPO_{engine.upper()}_PYTHON"
    if named := os.environ.get(variable):
        python = Path(named)
        if not python.exists():
            raise FileNotFoundError(f"{variable}={named} does not exist. Install it: python {INSTALLER} {engine}")
        return python
    found = subprocess.run(
        [sys.executable, str(INSTALLER), engine, "--where"], capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip(found.stderr.strip())
    return Path(found.stdout.strip())
