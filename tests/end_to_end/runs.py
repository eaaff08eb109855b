"""Small runs of the quick-start's configuration on ranks of this machine, and what they leave behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from megatron_fipo.parallel.local_ranks import run_local_ranks

ROOT = Path(__file__).parents[2]
QUICKSTART = "examples/quickstart/fipo.yaml"
BASE = "examples/quickstart/base"

SMALL = (
    "rollout.num_prompts=4",
    "rollout.num_samples_per_prompt=8",
    "train.num_minibatches=2",
    "train.num_epochs=1",
    "data.evaluation.held_out.num_prompts=2",
    "evaluation.num_samples_per_prompt=1",
    "run.num_sample_prints=1",
    "metrics.tensorboard=false",
    "metrics.num_traced_groups=8",  # of both updates
    "checkpoint.export_huggingface=false",
)
"""Two updates a step, seconds long."""
SHORT = ("data.train.chains.params.num_terms=4", "data.evaluation.held_out.params.num_terms=2")
"""Short responses, by the quick-start's own sources: others make no prompts."""

RUN_MARK = "MEGATRON_FIPO_TEST_RUN"
"""Environment variable of all that a run starts: the run's folder."""

Preparation = Callable[[], None]
"""Called on each rank before it trains, to watch or break something there; a module-level function or a partial."""


@dataclass(frozen=True)
class Outcome:
    """How a rank ended."""

    code: int
    output: str
    """Standard output and standard error."""

    @property
    def said(self) -> str:
        """The output as one line: where it was folded depends on how long the paths in it are."""
        return " ".join(self.output.split())


def train(
    folder: Path,
    *overrides: str,
    world_size: int = 2,
    config: str | Path = QUICKSTART,
    prepare: Preparation | None = None,
    expected: int | None = None,
    timeout_s: float = 240.0,
    logs: Path | None = None,
) -> list[Outcome]:
    """Call `megatron_fipo.train.main` on every rank, with as much context parallelism as there are ranks.

    Args:
        folder: run.output_dir.
        overrides: come after those of SMALL, and of SHORT for the quick-start.
        expected: exit code that every rank must have.
        logs: where what the ranks print is kept; beside the run's folder by default.
    """
    short = SHORT if config == QUICKSTART else ()
    argv = [str(config), *SMALL, *short, f"parallel.cp={world_size}", f"run.output_dir={folder}", *overrides]
    logs = logs or folder.parent / f"{folder.name}.logs"
    outcomes = on_ranks(argv, world_size, logs, mark=str(folder), prepare=prepare, timeout_s=timeout_s)
    if expected is not None:
        codes = [outcome.code for outcome in outcomes]
        assert codes == [expected] * world_size, "\n".join(outcome.output[-4000:] for outcome in outcomes)
    return outcomes


def on_ranks(
    argv: list[str],
    world_size: int,
    logs: Path,
    *,
    mark: str,
    prepare: Preparation | None = None,
    timeout_s: float = 240.0,
) -> list[Outcome]:
    """Call `megatron_fipo.train.main` on every rank, with these arguments and no others."""
    logs.mkdir(parents=True, exist_ok=True)
    codes = run_local_ranks(
        _train_on_rank,
        world_size,
        argv,
        logs,
        mark,
        prepare,
        preload=("tests.parallel.preload",),
        timeout_s=timeout_s,
    )
    return [Outcome(code, (logs / f"rank{rank}.txt").read_text()) for rank, code in enumerate(codes)]


def _train_on_rank(argv: list[str], logs: Path, mark: str, prepare: Preparation | None) -> int:
    from megatron_fipo.train import main

    os.chdir(ROOT)
    os.environ |= marks(mark)
    tempfile.tempdir = None  # it is looked for anew
    log = os.open(logs / f"rank{os.environ['RANK']}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if prepare is not None:
        prepare()
    try:
        return main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def run_command(command: Sequence[str], timeout_s: float, mark: str) -> tuple[int, str]:
    """(exit code, output) of a command in the clone; what runs over its time is killed with all its children."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **marks(mark)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        if process.poll() is None:
            for pid in processes_of(mark):  # torchrun's ranks lead sessions of their own
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
    return process.returncode, output


def quickstart_with(path: Path, source: dict[str, Any]) -> Path:
    """Write the quick-start's configuration with another training source, which overrides cannot put in its place."""
    config = yaml.safe_load((ROOT / QUICKSTART).read_text())
    config["data"]["train"] = {"source": source}
    config["model"]["path"] = BASE
    path.write_text(yaml.safe_dump(config))
    return path


def metric_lines(folder: Path) -> list[dict[str, Any]]:
    """Every line of metrics.jsonl, null as None."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def step_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of training steps; those of evaluations are left out."""
    return [line for line in metric_lines(folder) if "optim/grad_norm" in line]


def sample_files(folder: Path) -> dict[str, bytes]:
    """What was kept of the steps' responses, by file name."""
    return {path.name: path.read_bytes() for path in (folder / "samples").iterdir()}


def trace_files(folder: Path) -> dict[str, bytes]:
    """The traces of the run's steps, by file name."""
    return {path.name: path.read_bytes() for path in (folder / "traces").iterdir()}


def timeless(line: dict[str, Any]) -> dict[str, Any]:
    """A step's metrics without those that no two runs share: how long it took, and what engines did in this process."""
    of_processes = ("time_s/", "perf/tokens_per_s", "rollout/idle_slots/")
    return {name: value for name, value in line.items() if not name.startswith(of_processes)}


def exported_weights(folder: Path) -> dict[str, Tensor]:
    """Tensors of the exported model."""
    weights: dict[str, Tensor] = load_file(folder / "huggingface" / "model.safetensors")
    return weights


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def latest_checkpoint_name(folder: Path) -> str:
    """What `latest` names, which must be a whole checkpoint."""
    name = (folder / "checkpoints" / "latest").read_text().strip()
    assert (folder / "checkpoints" / name / "metadata.json").is_file()
    return name


def marks(mark: str) -> dict[str, str]:
    """Environment by which processes of a run are known: verifiers' workers keep none of it but the folder for
    temporary files, in which theirs lies. (Its path is short: sockets are made there.)"""
    temporary = Path(tempfile.gettempdir()) / f"fipo-{zlib.crc32(mark.encode()):08x}"
    temporary.mkdir(exist_ok=True)
    return {RUN_MARK: mark, "TMPDIR": str(temporary)}


def processes_of(mark: str) -> dict[int, str]:
    """Running processes that a run has started, by pid, with their command lines."""
    found = {}
    worker = f"TMPDIR={marks(mark)['TMPDIR']}/".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended, or is not ours
            continue
        if f"{RUN_MARK}={mark}".encode() in environment or any(entry.startswith(worker) for entry in environment):
            found[int(process.name)] = command
    return found
