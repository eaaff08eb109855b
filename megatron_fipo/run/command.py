"""`python -m megatron_fipo.train` on each rank: from the command line to a run, and from its end to an exit code."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from megatron_fipo.actor.backend import layers_in_use
from megatron_fipo.actor.non_finite import NonFiniteError
from megatron_fipo.checkpoint.error import CheckpointError
from megatron_fipo.config import (
    Config,
    is_hub_name,
    load_config,
    read_model_config,
    require_inputs,
    validate,
    validate_model_layout,
    warnings_for,
)
from megatron_fipo.console.console import Console
from megatron_fipo.convert.weight_files import find_weight_files
from megatron_fipo.parallel import cpu
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.device_memory import prefer_expandable_segments
from megatron_fipo.parallel.launcher import leave_with_the_launcher
from megatron_fipo.parallel.say_once import say_once
from megatron_fipo.parallel.waiting import OtherRankError
from megatron_fipo.rl.dynamic_sampling import BatchNotFilledError
from megatron_fipo.rollout.engine import NotFiniteError
from megatron_fipo.rollout.servers.http import ServerError
from megatron_fipo.rollout.streaming import GenerationAbortedError
from megatron_fipo.run.closing import command_that_resumes
from megatron_fipo.run.named_on_hub import NamedRun, resolve_for_run
from megatron_fipo.run.parts import RunParts
from megatron_fipo.run.place import Interrupted
from megatron_fipo.run.push_to_hub import check_before_run
from megatron_fipo.system.disk import DiskError
from megatron_fipo.system.error_net import EXIT_STOPPED, report
from megatron_fipo.verifiers.pool import WorkerStartError
from megatron_fipo.verifiers.registry import also_look_in


class Loop(Protocol):
    """A training loop over a run's parts."""

    parts: RunParts

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: after a signal, with everything saved.
        """
        ...


LoopMaker = Callable[[NamedRun, parallel_groups.ParallelGroups, Console], Loop]


def run_rank(argv: Sequence[str] | None, make_loop: LoopMaker) -> int:
    """Train as a configuration says, as one rank of all; the process's exit code.

    Args:
        argv: None takes the process's.
        make_loop: builds the loop, collectively over all ranks.
    """
    parser = argparse.ArgumentParser(prog="python -m megatron_fipo.train", description="Train a model.")
    parser.add_argument("config", help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.num_steps=5")
    arguments = parser.parse_args(argv)
    leave_with_the_launcher()
    try:
        config = load_config(arguments.config, arguments.overrides)
        also_look_in(Path(arguments.config).parent)
        validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
        require_inputs(config, arguments.config)
        if not is_hub_name(config.model.path):  # a model that is here is looked at before ranks wait for each other
            _warnings_of_model(config)
        return _train(config, [arguments.config, *arguments.overrides], make_loop)
    except Exception as error:  # noqa: BLE001 - every error ends in words and an exit code
        return report(error, say_once)


def _warnings_of_model(config: Config) -> list[str]:
    """Refuse a layout into which the model does not divide; what else there is to say."""
    model_config = read_model_config(config.model.path)
    validate_model_layout(config, model_config)
    left_over = find_weight_files(config.model.path).warning()
    return [*warnings_for(config, model_config), *[left_over] * bool(left_over)]


def _train(config: Config, arguments: Sequence[str], make_loop: LoopMaker) -> int:
    cpu.install()
    prefer_expandable_segments()
    ranks = parallel_groups.initialize(config.parallel, config.run.seed)
    if ranks.rank != 0:  # every rank reads the same data, and one tells of it
        logging.getLogger("megatron_fipo.data").setLevel(logging.ERROR)
    console = Console(config, enabled=ranks.rank == 0 and config.metrics.console)
    loop = None
    try:
        check_before_run(config, ranks.world)
        named = resolve_for_run(config, ranks.world, console.info)
        config = named.local
        warnings = [*named.notes, *_warnings_of_model(config)]
        loop = make_loop(named, ranks, console)
        actor = loop.parts.actor
        facts = {"parameters": f"{actor.num_parameters / 1e6:.2f} M on each rank"}
        facts["layers"] = layers_in_use(config.model, actor.shape.head_dim)
        console.banner(ranks.world.size(), facts)
        for warning in (*warnings, *loop.parts.warnings):
            console.warning(warning)
        loop.run()
    except Interrupted:
        command = command_that_resumes(config, arguments)
        console.command("stopped by a signal, and saved; this goes on from the checkpoint:", command)
        return EXIT_STOPPED
    except (
        *(BatchNotFilledError, NonFiniteError, NotFiniteError, CheckpointError, DiskError),
        *(ServerError, OtherRankError, WorkerStartError, GenerationAbortedError),
    ) as error:
        say_once(f"error: {error}")
        return EXIT_STOPPED
    except Exception as error:  # noqa: BLE001 - told before the groups go, at whose end other ranks would speak up
        return report(error, say_once)
    finally:
        try:
            if loop is not None:
                loop.parts.close()
        finally:
            parallel_groups.shut_down()
    return 0
