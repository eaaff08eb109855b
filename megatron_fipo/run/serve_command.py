"""`megatron-fipo serve`: inference servers that join a run that another process trains."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import signal
import socket
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_fipo.system import uncollected
from megatron_fipo.system.command_line import add_config_arguments

if TYPE_CHECKING:
    from megatron_fipo.rollout.servers.serving import Serving


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Start servers.num_per_node inference servers on this machine, and let them join the run that trains with this "
        "configuration, in the folder run.output_dir, which both must see. They get its weights with its next step, "
        "and leave it when this command ends: by Ctrl-C, SIGTERM, or because the run is finished. The run may begin "
        "later, stop and go on meanwhile."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--host", metavar="ADDRESS", help="where the servers listen, and the run finds them (default: this machine's)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve. Returns the exit status.

    Raises:
        ValueError: for a configuration whose runs no servers can join.
        ServerError: if servers do not come up, end too often, or are of no use to the run.
        DiskError: if the run's folder cannot be written to.
    """
    from megatron_fipo.config import load_config, require_inputs, validate

    config = load_config(arguments.config, arguments.overrides)
    validate(config, is_for_training=False)
    require_inputs(config, arguments.config, unread=("data.",))
    with uncollected.imports():
        from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
        from megatron_fipo.hub.models import model_folder
        from megatron_fipo.rollout.servers.announced import AnnouncedServers
        from megatron_fipo.rollout.servers.joining import what_is_served, why_none_may_join
        from megatron_fipo.rollout.servers.serving import Serving
        from megatron_fipo.rollout.servers.setup import ADAPTERS
        from megatron_fipo.rollout.servers.specs import device_of, launch_specs
        from megatron_fipo.run.folder import RunFolder

    if reason := why_none_may_join(config):
        raise ValueError(f"{reason}. As it is, no servers can join the run.")
    host = arguments.host or _own_host()
    # Servers of others that the run attaches to are none of this command's.
    config = replace(
        config,
        model=replace(config.model, path=model_folder(config.model.path, config.model.revision), revision=None),
        servers=replace(config.servers, urls=[]),
    )
    specs = launch_specs(config, device_of(config), urls=())
    base_port = config.servers.base_port
    specs = [
        replace(spec, host=host, port=0 if base_port is None else base_port + number)
        for number, spec in enumerate(specs)
    ]
    folder = RunFolder(Path(config.run.output_dir)).servers
    serving = Serving(
        ADAPTERS[config.rollout.engine](),
        specs,
        config.servers,
        what_is_served(config),
        AnnouncedServers(folder),
        folder / f"joined-{socket.gethostname()}-{os.getpid()}",
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    asyncio.run(_until_told_to_stop(serving))
    return 0


async def _until_told_to_stop(serving: Serving) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, serving.stop)
    await serving.run()


def _own_host() -> str:
    """The address of this machine that others can reach, as far as its own name tells.

    Raises:
        ValueError: if the name stands for an address of this machine alone, or none.
    """
    name = socket.gethostname()
    remedy = "Name one with --host; 127.0.0.1 does where the run is on this machine, too."
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise ValueError(f"this machine's name, {name}, has no address ({error}). {remedy}") from error
    if ipaddress.ip_address(address).is_loopback:
        raise ValueError(f"this machine's name, {name}, stands for {address}, which no other machine reaches. {remedy}")
    return address
