#!/usr/bin/env bash
# bash runs the next three lines, which start Python on this file; torchrun starts Python on it at once.
""":"
python="$(dirname "$0")/../../.venv/bin/python"; [ -x "$python" ] || python=python
exec "${PYTHON:-$python}" "$0" "$@"
":"""
import sys
from pathlib import Path

from megatron_fipo.launch.torchrun_script import main

if __name__ == "__main__":
    sys.exit(main(Path(__file__).with_name("dapo.yaml"), sys.argv[1:], planned_nodes=16))
