"""`megatron-fipo watch`: the report's page of runs that go on, served on this machine."""

from __future__ import annotations

import argparse

from megatron_fipo.report.report_command import add_trace_limit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Serve the report's page of a run, or of several, while they go on: on 127.0.0.1 alone, read-only, "
        "and refreshed as steps end. An ssh tunnel brings it to another machine."
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="folder of a run, such as outputs/quickstart")
    parser.add_argument("--port", type=port, default=0, metavar="N", help="by default a free one")
    add_trace_limit(parser)


def port(text: str) -> int:
    """The value of --port."""
    if not (text.isascii() and text.isdigit() and int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"{text!r} is no port from 0 to 65535")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    """Serve until Ctrl-C. Returns the exit status."""
    from pathlib import Path

    from megatron_fipo.report.page_file import installed_page
    from megatron_fipo.report.run_data import read_runs
    from megatron_fipo.report.watching import ADDRESS, LiveReport, open_server

    read_runs(arguments.run_folders)  # what cannot be read is said at once
    folders = [Path(folder) for folder in arguments.run_folders]
    live = LiveReport(folders, arguments.max_trace_tokens, installed_page())
    with open_server(arguments.port, live) as server:
        number = server.server_address[1]
        print(f"http://{ADDRESS}:{number}/ shows {', '.join(arguments.run_folders)} until Ctrl-C.")
        print(f"From another machine: ssh -N -L {number}:{ADDRESS}:{number} this-machine, then the same address there.")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0
