"""What a recipe's run script does, however it was started: `bash run_fipo.sh`, `torchrun run_fipo.sh`, or as Python.

torchrun runs a script with Python, in one process unless told otherwise; a run needs one process for each GPU. So:

    bash run.sh                              starts torchrun with one process for each GPU of this node
    torchrun run.sh                          one process: it starts torchrun again, likewise
    torchrun --nproc-per-node 8 run.sh       each process is a rank already and becomes the trainer

Environment, all optional: NNODES (1), NODE_RANK (0), MASTER_ADDR, MASTER_PORT (29501), GPUS_PER_NODE (all visible
ones), and those that the recipe's file reads itself: MODEL_PATH, TRAIN_FILE, TEST_FILE. A process becomes the next
program by exec, so that signals and exit statuses need no forwarding.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_fipo.config import Config, load_config, resolved_yaml, validate, without_secrets
from megatron_fipo.launch.tiny import TINY, TINY_RANKS, tiny_overrides
from megatron_fipo.system.exit_codes import EXIT_BAD_INPUT
from megatron_fipo.system.text_hygiene import clean_text

DEFAULT_PORT = 29501
"""torchrun's own default, 29500, belongs to the torchrun that may have started this script."""
_SET_BY_TORCHRUN = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
USAGE = """usage: {script} [--dry-run] [--gpu NAME] [model=tiny] [section.key=value ...]
  --dry-run    print the resolved configuration and the preflight verdict; builds and starts nothing
  --gpu NAME   GPU to plan for in a dry run (default: h100-80gb)
  model=tiny   the same script on this machine's CPU: two processes, the quick-start's model and task
Environment: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, GPUS_PER_NODE, MODEL_PATH, TRAIN_FILE, TEST_FILE."""


@dataclass(frozen=True)
class Arguments:
    """The arguments that follow the script's name."""

    overrides: tuple[str, ...]
    dry_run: bool = False
    gpu: str = "h100-80gb"
    is_tiny: bool = False


@dataclass(frozen=True)
class Nodes:
    """The nodes and processes of a run.

    Attributes:
        number: number of nodes.
        rank: rank of this node.
        processes: processes on each node.
        address, port: where the first node waits for the others.
    """

    number: int
    rank: int
    processes: int
    address: str
    port: int


def main(config_file: Path, argv: Sequence[str], *, planned_nodes: int = 1) -> int:
    """Run a recipe. Returns an exit status where it does not become another program.

    Args:
        config_file: the recipe's YAML file.
        argv: arguments after the script's name.
        planned_nodes: nodes of eight GPUs that the recipe is meant for; a dry run plans for them unless NNODES is set.
    """
    try:
        arguments = parse(argv, Path(sys.argv[0]).name)
    except ValueError as error:
        print(error, file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        small = tiny_overrides(config_file) if arguments.is_tiny else ()
        overrides = (*small, *arguments.overrides)
        config = load_config(config_file, overrides)
        if arguments.dry_run:
            return dry_run(config, config_file, arguments, planned_nodes)
        if is_rank(os.environ, arguments.is_tiny):
            return _become([sys.executable, "-m", "megatron_fipo.train", str(config_file), *overrides], os.environ)
        nodes = nodes_of(os.environ, arguments.is_tiny)
        validate(config, nodes.number * nodes.processes)  # once, and not by every process
    except ValueError as error:
        print(clean_text(without_secrets(f"error: {error}")), file=sys.stderr)
        return EXIT_BAD_INPUT
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun_options(nodes)]
    return _become([*command, "-m", "megatron_fipo.train", str(config_file), *overrides], without_torchrun(os.environ))


def parse(argv: Sequence[str], script: str = "run.sh") -> Arguments:
    """Read the command line.

    Raises:
        ValueError: with the usage, for --help or an option that does not exist.
    """
    overrides: list[str] = []
    dry_run, is_tiny, gpu = False, False, Arguments.gpu
    words = iter(argv)
    for word in words:
        if word == "--dry-run":
            dry_run = True
        elif word == "--gpu" or word.startswith("--gpu="):
            gpu = word.partition("=")[2] or next(words, "")
        elif word == TINY:
            is_tiny = True
        elif word.startswith("-") or "=" not in word:
            unknown = "" if word in ("-h", "--help") else f"{word}: no such option, and no section.key=value\n"
            raise ValueError(unknown + USAGE.format(script=script))
        else:
            overrides.append(word)
    return Arguments(tuple(overrides), dry_run, gpu, is_tiny)


def dry_run(config: Config, config_file: Path, arguments: Arguments, planned_nodes: int) -> int:
    """Print configuration and plan, on rank 0 only. Returns preflight's exit status."""
    from megatron_fipo.preflight.tables import Options, report

    if os.environ.get("RANK", "0") != "0":
        return 0
    number = _number("NNODES", os.environ, default=planned_nodes)
    processes = _number("GPUS_PER_NODE", os.environ, default=8)
    if arguments.is_tiny:
        number, processes = 1, TINY_RANKS
    print(resolved_yaml(config), flush=True)
    sizes = config_file.with_name("model_config.json")
    is_here = Path(config.model.path).is_dir()
    options = Options(
        world_size=number * processes,
        gpus_per_node=processes,
        gpu=arguments.gpu,
        model_config=None if is_here or not sizes.is_file() else str(sizes),
    )
    return report(config, options)


def is_rank(environment: Mapping[str, str], is_tiny: bool) -> bool:
    """Whether torchrun has started this process as one rank of the run, rather than as its only process here.

    Raises:
        ValueError: if torchrun started several processes here, but for other nodes than NNODES says.
    """
    if "LOCAL_WORLD_SIZE" not in environment:
        return False
    processes, nodes = int(environment["LOCAL_WORLD_SIZE"]), int(environment.get("GROUP_WORLD_SIZE", "1"))
    wanted_nodes = _number("NNODES", environment, default=nodes)
    if processes == 1:
        return processes_per_node(environment, is_tiny) == 1 and wanted_nodes == nodes
    if wanted_nodes != nodes:
        raise ValueError(
            f"NNODES={wanted_nodes}, but torchrun was started for {nodes} with {processes} processes each. Leave "
            "--nproc-per-node out, or give torchrun --nnodes and --node-rank, too."
        )
    return True


def nodes_of(environment: Mapping[str, str], is_tiny: bool) -> Nodes:
    """Nodes and processes to start, from the environment or from the torchrun that started this process.

    Raises:
        ValueError: if a variable is no number, or the first node's address is not known.
    """
    processes = processes_per_node(environment, is_tiny)
    outer_nodes = int(environment.get("GROUP_WORLD_SIZE", "1"))
    under_torchrun = "LOCAL_WORLD_SIZE" in environment
    if outer_nodes > 1:  # torchrun --nnodes N run.sh: the nodes have found each other already
        number, rank = outer_nodes, int(environment["GROUP_RANK"])
        return Nodes(number, rank, processes, environment["MASTER_ADDR"], int(environment["MASTER_PORT"]) + 1)
    users = environment_before_torchrun() if under_torchrun else environment
    number, rank = _number("NNODES", users, default=1), _number("NODE_RANK", users, default=0, least=0)
    if rank >= number:
        raise ValueError(f"NODE_RANK={rank}: must be below NNODES={number}.")
    if number > 1 and not users.get("MASTER_ADDR"):
        raise ValueError(f"NNODES={number} needs MASTER_ADDR, the name or address of the node with NODE_RANK=0.")
    port = _number("MASTER_PORT", users, default=DEFAULT_PORT)
    if under_torchrun and str(port) == environment.get("MASTER_PORT"):
        port += 1  # the torchrun that started this process listens there
    return Nodes(number, rank, processes, users.get("MASTER_ADDR", "127.0.0.1"), port)


def processes_per_node(environment: Mapping[str, str], is_tiny: bool) -> int:
    """GPUS_PER_NODE, or the GPUs that there are, or the tiny run's two processes.

    Raises:
        ValueError: if there are no GPUs, no GPUS_PER_NODE and no model=tiny.
    """
    if "GPUS_PER_NODE" in environment:
        return _number("GPUS_PER_NODE", environment, default=1)
    if is_tiny:
        return TINY_RANKS
    found = _visible_gpus()
    if not found:
        raise ValueError(
            "no GPU was found (nvidia-smi), and GPUS_PER_NODE is not set. Set GPUS_PER_NODE, try model=tiny on a CPU, "
            "or --dry-run."
        )
    return found


def _visible_gpus() -> int:
    """GPUs that processes started here will see; asked of nvidia-smi, because importing torch takes seconds."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip()])
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 0
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def environment_before_torchrun() -> dict[str, str]:
    """The environment that the user gave torchrun, which overwrites MASTER_ADDR and MASTER_PORT for what it starts.

    It is the parent process's; where that cannot be read (only Linux has /proc), this process's own without them.
    """
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
    except OSError:
        return without_torchrun(os.environ)
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def torchrun_options(nodes: Nodes) -> list[str]:
    """The options that make torchrun start the processes."""
    options = ["--nproc-per-node", str(nodes.processes)]
    if nodes.number == 1:
        return ["--standalone", *options]  # on a port that is free
    return [
        *("--nnodes", str(nodes.number), "--node-rank", str(nodes.rank)),
        *("--master-addr", nodes.address, "--master-port", str(nodes.port)),
        *options,
    ]


def without_torchrun(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables that a torchrun has set: another torchrun is about to be started."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _SET_BY_TORCHRUN and not name.startswith("TORCHELASTIC_")
    }


def _number(name: str, environment: Mapping[str, str], default: int, least: int = 1) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{name}={text}: must be a whole number of at least {least}.")
    return int(text)


def _become(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Replace this process by another program."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], list(command), dict(environment))
