"""`megatron-fipo report`: one page on one run or several, which opens in any browser from disk."""

from __future__ import annotations

import argparse

from megatron_fipo.system.command_line import count

FILE_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Write one self-contained page on a run: a verdict in words, every figure, samples, and which tokens were "
        "re-weighted. Several runs are compared, those that differ in their seed alone as a group."
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="folder of a run, such as outputs/quickstart")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help=f"by default RUN/{FILE_NAME} for one run, {FILE_NAME} here for several"
    )
    add_trace_limit(parser)


def add_trace_limit(parser: argparse.ArgumentParser) -> None:
    """Add the option that bounds the page's size."""
    parser.add_argument(
        "--max-trace-tokens",
        type=count,
        default=300_000,
        metavar="N",
        help="show at most N tokens of traces, some 60 bytes each; those of the newest and earliest steps first "
        "(default: 300000)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the page. Returns the exit status."""
    from pathlib import Path

    from megatron_fipo.analysis.of_run import analyse_run
    from megatron_fipo.report.page_file import installed_page, write_page
    from megatron_fipo.report.report_data import make_report
    from megatron_fipo.report.run_data import read_measured_runs

    folders = arguments.run_folders
    output = Path(arguments.output or (Path(folders[0]) / FILE_NAME if len(folders) == 1 else FILE_NAME))
    if output.is_dir():
        raise ValueError(f"--output={output} is a folder. Name the file to write, such as {output / FILE_NAME}.")
    runs = read_measured_runs(folders)
    page = installed_page()
    report = make_report(runs, [analyse_run(run.folder) for run in runs], arguments.max_trace_tokens)
    size = write_page(output, report, page)
    print(f"{output} ({size / 1e6:.1f} MB): open it in a browser; it needs no network.")
    if report.num_shown < report.num_traced:
        print(
            f"It shows {report.num_shown:,} of {report.num_traced:,} traced responses; --max-trace-tokens "
            f"{2 * arguments.max_trace_tokens} would show more."
        )
    return 0
