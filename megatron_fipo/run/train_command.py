"""`megatron-fipo train`: one process, or several that this one starts and watches."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from megatron_fipo.system import uncollected
from megatron_fipo.system.command_line import add_config_arguments

if TYPE_CHECKING:
    from megatron_fipo.config import ParallelSection

_PROCESSES_ANYWHERE, _PROCESSES_PER_CORE = 128, 16
"""A number of processes above both limits is refused as a slip of the finger: it would bring the machine down."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command."""
    parser.description = (
        "Train on this machine. Several machines are torchrun's: torchrun … -m megatron_fipo.train CONFIG."
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--nproc",
        metavar="N",
        help="processes, or 'gpu' for one on each GPU (default: tp * pp * cp, one copy of the model)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Train to the end. Returns the exit status."""
    from megatron_fipo.config import load_config, validate

    of_each_rank = [arguments.config, *arguments.overrides]
    if "WORLD_SIZE" in os.environ and arguments.nproc is None:  # torchrun started this process
        num_processes = 1
    else:
        config = load_config(arguments.config, arguments.overrides)
        num_processes = _num_processes(arguments.nproc, config.parallel)
        if num_processes > 1:
            validate(config, num_processes)  # each process would refuse it too, once it has started
    if num_processes == 1:
        with uncollected.imports():
            from megatron_fipo.train import main

        return main(of_each_rank)
    with uncollected.imports():
        from megatron_fipo.parallel.launcher import launch

    return launch(num_processes, of_each_rank, ["megatron-fipo", *arguments.typed])


def _num_processes(given: str | None, parallel: ParallelSection) -> int:
    """The number of processes that --nproc asks for."""
    if given is None:
        return parallel.tp * parallel.pp * parallel.cp
    if given == "gpu":
        import torch

        if not torch.cuda.is_available():
            raise ValueError("--nproc=gpu starts a process on each GPU, and there is none here; give a number.")
        return torch.cuda.device_count()
    if not given.isascii() or not given.isdigit() or int(given) < 1:
        raise ValueError(f"--nproc={given}: must be a number of processes, at least 1, or 'gpu'.")
    most = max(_PROCESSES_ANYWHERE, _PROCESSES_PER_CORE * (os.cpu_count() or 1))
    if len(given) > len(str(most)) or int(given) > most:
        raise ValueError(f"--nproc={given}: this machine has {os.cpu_count()} cores; start at most {most} processes.")
    return int(given)
