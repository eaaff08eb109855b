"""The end of a run: the model is exported and pushed, and the user hears where things lie and how to go on."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_fipo.config import Config
from megatron_fipo.parallel.agreement import decided_by_leader
from megatron_fipo.parallel.launcher import COMMAND
from megatron_fipo.rollout.servers.announced import AnnouncedServers
from megatron_fipo.run.parts import RunParts
from megatron_fipo.run.push_to_hub import push_after_run


def close_run(parts: RunParts) -> None:
    """Export the model, push it where that is asked for, and say where things lie. Collective over all ranks."""
    _let_servers_go(parts)
    if parts.config.checkpoint.export_huggingface:
        parts.saved.export(parts.records.folder.huggingface)
    _push_and_say_where_things_lie(parts)


def close_run_again(parts: RunParts, num_steps: int) -> None:
    """A run that was finished before has nothing to do but to export what is not there, and to push it. Collective.

    The hub takes what it has already for no change, so a push that failed, or that a kill came before, is made up.
    """
    ended_by = parts.ending.ended_by
    parts.console.info(
        f"the run is finished: its {num_steps} steps are done and saved, and nothing is done again. "
        f"{f'Change train.stop_when={ended_by}' if ended_by else 'Raise train.num_steps'} to go on, or "
        "set train.resume=false to start over (this run is renamed)"
    )
    _let_servers_go(parts)
    folder = parts.records.folder.huggingface
    if parts.config.checkpoint.export_huggingface and not folder.is_dir():
        parts.saved.export(folder)
    _push_and_say_where_things_lie(parts)


def _let_servers_go(parts: RunParts) -> None:
    """Servers that others have started for this run are not needed any more."""
    announced = AnnouncedServers(parts.records.folder.servers)
    decided_by_leader(lambda: announced.set_finished(True), parts.ranks.world)


def _push_and_say_where_things_lie(parts: RunParts) -> None:
    config, folder = parts.config, parts.records.folder
    pushed = push_after_run(parts.named, folder, parts.ranks.world, parts.console)
    places = {"checkpoint": str(folder.checkpoints)}
    if parts.best.step:
        places["best model"] = f"{folder.best} (after {parts.best.step} steps)"
    if config.metrics.jsonl:
        places["metrics"] = str(folder.metrics)
        places["report"] = f"{_console_script()} report {folder.root}"
    if config.metrics.tensorboard:
        places["TensorBoard"] = f"tensorboard --logdir {folder.root / 'tensorboard'}"
    command = None
    if config.checkpoint.export_huggingface:
        places["model"] = f"{folder.huggingface} (Hugging Face format)"
        command = f"{_console_script()} chat {folder.huggingface}"
    if pushed:
        places["on the hub"] = pushed
    parts.console.closing(places, command, parts.evaluation.prompts_to_try())


def command_that_resumes(config: Config, arguments: Sequence[str]) -> str:
    """Return the command that resumes the run: the one that was typed, with train.resume=true if it said otherwise."""
    typed = os.environ.get(COMMAND)
    if typed is None:
        launcher = (
            f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
            if "LOCAL_WORLD_SIZE" in os.environ
            else "python"
        )
        typed = f"{launcher} -m megatron_fipo.train {shlex.join(arguments)}"
    return typed if config.train.resume else f"{typed} train.resume=true"


def _console_script() -> str:
    """Return the command by which this environment's `megatron-fipo` is called from here."""
    script = Path(sys.executable).with_name("megatron-fipo")
    here = Path.cwd()
    return str(script.relative_to(here)) if script.is_relative_to(here) else "megatron-fipo"
