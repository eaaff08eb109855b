"""Arguments that several commands take."""

from __future__ import annotations

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the configuration file, and any number of overrides of its keys."""
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    # With a default, argparse no longer says that some are required.
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="such as train.num_steps=5")


def count(text: str) -> int:
    """The value of an option that is a number of things, at least 1."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)
