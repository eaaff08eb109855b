"""Submitting the quick-start to the cluster under test, and following what becomes of it."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.end_to_end.runs import QUICKSTART, ROOT, SMALL, step_lines
from tests.slurm.cluster import ACCOUNT, PARTITION, Cluster

TIMEOUT_S = 240.0
SETTINGS = {
    "nodes": 2,
    "gpus_per_node": None,
    "processes_per_node": 1,
    "exclusive": False,  # both nodes are this host
    "account": ACCOUNT,
    "partition": PARTITION,
    "time": "10",
    "signal_before_end_s": 60,
    "python": sys.executable,
    "env": {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
}


@dataclass(frozen=True)
class SubmittedRun:
    """A job and the run that it makes.

    Attributes:
        number: Slurm's, of the job. folder: run.output_dir. logs: where its output goes.
    """

    cluster: Cluster
    number: str
    folder: Path
    logs: Path

    def states(self) -> list[str]:
        """Of the job and of every earlier time that it ran, the newest last."""
        command = ("sacct", "--duplicates", "-X", "-n", "--parsable2", "-j", self.number, "-o", "State")
        return self.cluster.run(*command).split("\n")

    def accounting(self, column: str) -> str:
        """A column of sacct for the job as a whole, the last time that it ran."""
        return self.cluster.run("sacct", "-X", "-n", "--parsable2", "-j", self.number, "-o", column)

    def log(self, times_requeued: int = 0) -> str:
        """What the run printed the so-many-th time that it ran."""
        return "".join(path.read_text() for path in self.logs.glob(f"log-*_{self.number}_{times_requeued}.out"))

    def num_steps(self) -> int:
        """Steps that have been logged."""
        return len(step_lines(self.folder)) if (self.folder / "metrics.jsonl").exists() else 0

    def wait_until(self, is_true: Callable[[], bool], what: str, timeout_s: float = TIMEOUT_S) -> None:
        """Wait; if the job ends otherwise, or it takes too long, show its logs."""
        end = time.monotonic() + timeout_s
        while not is_true():
            if time.monotonic() > end or self.has_ended():
                if is_true():  # it has come true while we looked
                    return
                logs = {path.name: path.read_text()[-3000:] for path in sorted(self.logs.glob("*.out"))}
                raise AssertionError(f"{what}: not so; states {self.states()}; logs {logs}")
            time.sleep(0.5)

    def has_ended(self) -> bool:
        return not self.cluster.run("squeue", "-h", "-j", self.number, "-o", "%T")

    def wait_for_end(self, *states: str) -> None:
        """Wait until the job has left the queue, and its states, requeues included, are these."""
        self.wait_until(self.has_ended, "the job's end")
        self.wait_until(lambda: [state.split()[0] for state in self.states()] == list(states), f"states {states}")


@dataclass(frozen=True)
class Submitter:
    """Calls `megatron-fipo submit`.

    Attributes:
        python: with NeMo-Run. folder: of settings, jobs and runs.
    """

    cluster: Cluster
    python: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, name: str, *overrides: str, **settings: object) -> SubmittedRun:
        """Submit the quick-start.

        Args:
            name: run.name.
            overrides: of the configuration. settings: of the submission.
        """
        output = self.command(name, *overrides, **settings)
        job = re.search(r"^job (\d+): 2 × 1 ranks", output, re.MULTILINE)
        logs = re.search(r"^logs: (.+)$", output, re.MULTILINE)
        assert job, output
        assert logs, output
        return SubmittedRun(self.cluster, job[1], self.folder / name, Path(logs[1]))

    def command(self, name: str, *overrides: str, dry_run: bool = False, **settings: object) -> str:
        """The command's standard output."""
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**SETTINGS, "job_dir": str(self.folder / "jobs"), **settings}))
        run = (f"run.name={name}", f"run.output_dir={self.folder / name}", "train.resume=true")
        small = [text for text in SMALL if not text.startswith("checkpoint.export_huggingface")]
        command = [self.python, "-m", "megatron_fipo.cli", "submit", QUICKSTART, *small, *run, *overrides]
        command += ["--cluster", str(file), *(["--dry-run"] if dry_run else [])]
        environment = {**self.cluster.environment, **self.environment}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout
