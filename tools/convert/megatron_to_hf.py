"""Converts a Megatron checkpoint into a Hugging Face folder. See README.md, and --help."""

import sys

from megatron_fipo.convert.offline.command import add_megatron_to_hf, run

if __name__ == "__main__":
    sys.exit(run(add_megatron_to_hf))
