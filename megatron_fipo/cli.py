"""The command line, `megatron-fipo`: a table of commands.

The module of a command has `add_arguments(parser)` and `run(arguments)`, which returns the exit status. It is imported
when the command is called, and imports in turn what it needs when it runs, so that help comes at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from megatron_fipo import __version__
from megatron_fipo.system.nearest_name import did_you_mean


class Command(NamedTuple):
    """One command.

    Attributes:
        module: its module in this package.
        help: its line in the list of commands.
    """

    module: str
    help: str


COMMANDS = {
    "init": Command("starters.command", "write an example that runs: a configuration with all that it reads"),
    "train": Command("run.train_command", "train on this machine, in as many processes as the layout or --nproc says"),
    "evaluate": Command("evaluation.evaluate_command", "score a model on the configuration's evaluation data"),
    "samples": Command("run.samples_command", "show what a run's model wrote in training"),
    "report": Command(
        "report.report_command", "write one page on a run or several: verdict, figures, credit per token"
    ),
    "watch": Command("report.watch_command", "serve that page while a run goes on, on this machine alone"),
    "analyse": Command(
        "analysis.command", "what a run's responses consist of: re-checks, restarts, repetition, lengths by part"
    ),
    "chat": Command("evaluation.chat_command", "talk to a model"),
    "validate": Command(
        "run.validate_command", "check a configuration and its files, and print it in full, without running it"
    ),
    "preflight": Command(
        "preflight.command",
        "memory, work and time of a run, computed before it is submitted; needs no GPU and no model",
    ),
    "serve": Command("run.serve_command", "start inference servers that join a run while it goes on"),
    "prepare": Command("data.prepare_command", "fetch a data set into a file that the recipes read"),
    "certify": Command(
        "certify.command", "compare training under every layout with one process, on this machine's CPU or GPUs"
    ),
    "conformance": Command(
        "conformance.command", "compare another implementation of the loss with recordings of FIPO's public code"
    ),
    "submit": Command("launch.command", "hand a run to Slurm, or print the job's scripts; needs NeMo-Run"),
    "convert": Command("convert.offline.convert_command", "between Hugging Face folders and Megatron checkpoints"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 2 for input that cannot be used, or the command's own."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse(argv)
    try:
        status: int = arguments.run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads, such as head, has seen enough
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())  # else Python complains as it leaves
        return 0
    except Exception as error:  # noqa: BLE001 - every error ends in words and an exit code
        from megatron_fipo.system.error_net import report, say_on_stderr

        return report(error, say_on_stderr, f"megatron-fipo {arguments.command}")
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """What was typed.

    Raises:
        SystemExit: with 2 if it is no command line of ours, which has been said then; with 0 after --help or --version.
    """
    called = argv[0] if argv and not argv[0].startswith("-") else None
    parser = _parser(called)
    if called is not None and called not in COMMANDS:
        parser.error(f"there is no command {called!r}.{did_you_mean(called, COMMANDS)} Known: {', '.join(COMMANDS)}")
    # An override may stand behind an option, where argparse no longer takes it for one.
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_override_hint(arguments, rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    arguments.typed = argv
    return arguments


def _parser(called: str | None) -> argparse.ArgumentParser:
    """A parser that knows all commands by name, and the arguments of the one that is called."""
    parser = argparse.ArgumentParser(
        prog="megatron-fipo",
        description="Train language models to reason, by FIPO on Megatron-Core.",
        epilog="To begin: 'megatron-fipo init' writes an example and says what to type next. "
        "'megatron-fipo COMMAND --help' tells of one command.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-fipo {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        of_command = commands.add_parser(name, help=command.help)
        if name == called:
            module = importlib.import_module(f"megatron_fipo.{command.module}")
            module.add_arguments(of_command)
            of_command.set_defaults(run=module.run)
    return parser


def _override_hint(arguments: argparse.Namespace, rest: Sequence[str]) -> str:
    """What to write in place of a flag of another trainer, for a command that takes overrides."""
    if not hasattr(arguments, "overrides"):
        return ""
    from megatron_fipo.config.foreign_keys import foreign_hint

    hints = [foreign_hint(text.partition("=")[0]) for text in rest if text.startswith("-")]
    return " ".join(
        [
            ". Keys of the configuration are written without dashes: section.key=value.",
            *dict.fromkeys(filter(None, hints)),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
