"""`megatron-fipo submit`: a run for Slurm, or a look at its scripts."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_fipo.system.command_line import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = "Submit a run through NeMo-Run. Flags overrule the settings file."
    add_config_arguments(parser)
    parser.add_argument("--cluster", type=Path, metavar="FILE", help="YAML file of settings, see docs/slurm.md")
    parser.add_argument("--dry-run", action="store_true", help="print the sbatch script; submit nothing")
    parser.add_argument("--executor", choices=("slurm", "local"), help="local: torchrun on this machine")
    for flag, of_what in (("nodes", "number of nodes"), ("gpus-per-node", "GPUs of each node")):
        parser.add_argument(f"--{flag}", type=int, metavar="N", help=of_what)
    for flag in ("account", "partition", "qos"):
        parser.add_argument(f"--{flag}", metavar="NAME")
    parser.add_argument("--time", metavar="LIMIT", help="limit of one allocation, such as 04:00:00")


def run(arguments: argparse.Namespace) -> int:
    """Submit the run, or print what would be submitted. Returns the exit status."""
    from megatron_fipo.launch.submit import FLAGS, Request, submit_or_show

    flags = {name: getattr(arguments, name) for name in FLAGS}
    request = Request(arguments.config, arguments.overrides, arguments.cluster, flags, arguments.dry_run)
    return submit_or_show(request)
