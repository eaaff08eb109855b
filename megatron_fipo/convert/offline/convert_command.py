"""`megatron-fipo convert`: the conversions as one command."""

from __future__ import annotations

import argparse

from megatron_fipo.convert.offline.command import CONVERSIONS, run_conversion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command: one subcommand for each conversion."""
    conversions = parser.add_subparsers(required=True, metavar="CONVERSION")
    for name, add_arguments_of_conversion in CONVERSIONS.items():
        described = argparse.ArgumentParser()
        add_arguments_of_conversion(described)  # its description is also its line in the list
        add_arguments_of_conversion(conversions.add_parser(name, help=described.description))


run = run_conversion
