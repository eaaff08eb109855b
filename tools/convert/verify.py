"""Checks that converted weights are the same weights. See README.md, and --help."""

import sys

from megatron_fipo.convert.offline.command import add_verify, run

if __name__ == "__main__":
    sys.exit(run(add_verify))
