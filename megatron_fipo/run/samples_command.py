"""`megatron-fipo samples`: responses that a run has kept, shown in the terminal."""

from __future__ import annotations

import argparse

from megatron_fipo.system.command_line import count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = "Show responses that a run has kept of its steps (metrics.num_samples_per_step)."
    parser.add_argument("run_folder", metavar="RUN", help="folder of the run, such as outputs/quickstart")
    parser.add_argument("--step", type=int, metavar="N", help="by default the newest")
    parser.add_argument("--source", metavar="NAME", help="of data.train; only its responses")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--right", action="store_const", const=True, dest="right", help="only right ones")
    kind.add_argument("--wrong", action="store_const", const=False, dest="right", help="only wrong ones")
    parser.add_argument("--limit", type=count, metavar="N", help="show at most N")
    parser.add_argument("--full", action="store_true", help="whole texts, however long")


def run(arguments: argparse.Namespace) -> int:
    """Show them. Returns the exit status."""
    from megatron_fipo.run.samples import show_samples

    show_samples(
        arguments.run_folder,
        arguments.step,
        arguments.source,
        arguments.right,
        arguments.limit,
        full=arguments.full,
    )
    return 0
