"""`megatron-fipo analyse`: what a run's responses consist of, and how that changed, shown in the terminal."""

from __future__ import annotations

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Show what the responses that runs have kept consist of, at the first and the last step of which there are "
        "any: length by part, re-checks and what they changed, restarts, repetition, languages, and how responses end. "
        "Reads evaluation/, samples/ and traces/."
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, such as outputs/quickstart")
    parser.add_argument("--json", metavar="FILE", help="write all values at all steps into this file")


def run(arguments: argparse.Namespace) -> int:
    """Show them, and write them. Returns the exit status.

    Raises:
        ValueError: if a folder holds no responses, or a damaged file.
        DiskError: if the file cannot be written.
    """
    import json
    from contextlib import suppress
    from pathlib import Path

    from megatron_fipo.analysis.of_run import analyse_run
    from megatron_fipo.analysis.table import print_analysis
    from megatron_fipo.system.disk import write_text_whole

    plain = []
    for folder in arguments.runs:
        analysis = analyse_run(folder)
        if not analysis.points:
            raise ValueError(
                f"{folder} holds no responses. A run keeps some of each step in samples/ (unless "
                "metrics.num_samples_per_step is 0), those of evaluations in evaluation/ and those that it traces in "
                "traces/."
            )
        plain.append({"run": str(folder), **analysis.to_plain()})
        with suppress(SystemExit):  # rich's word for a pipe whose reader, such as head, has seen enough
            print_analysis(str(folder), analysis)
    if arguments.json:
        content = {"format": 1, "runs": plain}
        write_text_whole(Path(arguments.json), json.dumps(content, indent=1) + "\n", "it writes the file")
    return 0
