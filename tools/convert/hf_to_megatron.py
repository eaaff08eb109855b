"""Converts a Hugging Face folder into a Megatron checkpoint. See README.md, and --help."""

import sys

from megatron_fipo.convert.offline.command import add_hf_to_megatron, run

if __name__ == "__main__":
    sys.exit(run(add_hf_to_megatron))
