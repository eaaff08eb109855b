"""`megatron-fipo train --nproc 2` as a user types it: how runs end, what is said then, and that they go on."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.runs import (
    QUICKSTART,
    ROOT,
    SHORT,
    SMALL,
    latest_checkpoint_name,
    marks,
    processes_of,
    step_lines,
)

PROGRAM = str(Path(sys.executable).with_name("megatron-fipo"))
PATIENCE_S = 240.0
NUM_STEPS = 200
"""More than any of these runs comes to."""


class Run:
    """A run under the launcher, in a process group of its own like a terminal's."""

    def __init__(self, folder: Path, command: list[str]) -> None:
        self.folder = folder
        self.log = folder.parent / f"{time.monotonic_ns()}.log"
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**environment, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **marks(str(folder))},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def ranks(self) -> list[int]:
        """Process ids of the ranks, rank 0 first."""
        found = [pid for pid, line in processes_of(str(self.folder)).items() if "-m megatron_fipo.train" in line]
        return sorted(found, key=rank_of)

    def wait_for_step(self, step: int) -> None:
        self.wait(lambda: has_step(self.folder, step), f"step {step}")

    def wait(self, condition: Callable[[], bool], what: str, *, running: bool = True) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert not running or self.process.poll() is None, f"ended before {what}:\n{self.output[-3000:]}"
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.output[-3000:]}"
            time.sleep(0.05)

    def code(self) -> int:
        return self.process.wait(PATIENCE_S)

    def end(self) -> None:
        for pid in processes_of(str(self.folder)):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


def rank_of(pid: int) -> int:
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next(int(entry[5:]) for entry in environment if entry.startswith(b"RANK="))


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for this signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask, 16) >> (number - 1) & 1)


def has_step(folder: Path, step: int) -> bool:
    return (folder / "metrics.jsonl").exists() and any(line["step"] == step for line in step_lines(folder))


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    started = []

    def start(*arguments: str, command: str | None = None) -> Run:
        folder = tmp_path / "run"
        typed = shlex.split(command) if command else ["megatron-fipo", "train", *arguments, f"run.output_dir={folder}"]
        started.append(Run(folder, [PROGRAM, *typed[1:]]))
        return started[-1]

    yield start
    for run in started:
        run.end()


def test_bad_input_ends_with_one_sentence_and_its_exit_code(runs: Callable[..., Run]) -> None:
    run = runs(QUICKSTART, "--nproc", "2", "data.train.chains.params.num_terms=1")
    assert run.code() == 2
    assert run.output.count("error:") == 1
    last = run.output.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "num_terms" in run.output
    for noise in ("Traceback", "ChildFailedError", "OMP_NUM_THREADS", "exitcode"):
        assert noise not in run.output


def test_ends_of_a_run_and_how_it_goes_on(runs: Callable[..., Run]) -> None:
    """One run: a rank is killed, then the launcher, then Ctrl-C, whose printed command goes on."""
    small = (
        QUICKSTART,
        *SMALL,
        *SHORT,
        f"train.num_steps={NUM_STEPS}",
        "train.resume=true",
        "checkpoint.every_num_steps=1",
    )
    killed = runs(*small)  # cp=2 asks for two processes by itself
    killed.wait_for_step(1)
    ranks = killed.ranks()
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert killed.code() == 128 + signal.SIGKILL
    assert f"error: rank 1 (process {ranks[1]}) was ended by SIGKILL" in killed.output.strip().splitlines()[-1]
    killed.wait(lambda: not processes_of(str(killed.folder)), "everything to be gone", running=False)

    orphaned = runs(*small, "--nproc", "2")
    orphaned.wait(lambda: "resumed from" in orphaned.output, "the run to go on")
    orphaned.wait_for_step(3)
    os.kill(orphaned.process.pid, signal.SIGKILL)
    orphaned.wait(lambda: not processes_of(str(orphaned.folder)), "the ranks to leave with it", running=False)
    assert "saved" in orphaned.output
    saved = latest_checkpoint_name(orphaned.folder)

    stopped = runs(*small)
    stopped.wait(lambda: "resumed from" in stopped.output, "the run to go on")
    assert saved in stopped.output
    step = max(line["step"] for line in step_lines(stopped.folder))
    stopped.wait_for_step(step + 1)
    os.killpg(stopped.process.pid, signal.SIGINT)  # as a terminal's Ctrl-C
    assert stopped.code() == 3
    assert "Traceback" not in stopped.output
    command = stopped.output.strip().splitlines()[-1].strip()
    assert command.startswith(f"megatron-fipo train {QUICKSTART} ")
    step = max(line["step"] for line in step_lines(stopped.folder))

    finished = runs(command=f"{command} train.num_steps={step + 2}")
    assert finished.code() == 0, finished.output[-3000:]
    assert "resumed from" in finished.output
    assert has_step(finished.folder, step + 1)


def test_the_command_that_goes_on_says_resume_where_the_run_does_not(runs: Callable[..., Run]) -> None:
    # train.resume is false in the quick-start.
    run = runs(QUICKSTART, *SMALL, *SHORT, f"train.num_steps={NUM_STEPS}", "--nproc", "2")
    run.wait_for_step(0)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.code() == 3
    assert run.output.strip().splitlines()[-1].endswith(" train.resume=true")


def test_a_second_signal_ends_the_run_at_once(runs: Callable[..., Run]) -> None:
    run = runs(QUICKSTART, "--nproc", "2")
    # A rank that is still importing would be ended by the first signal.
    run.wait(lambda: [catches(pid, signal.SIGTERM) for pid in run.ranks()] == [True, True], "ranks that save when told")
    os.kill(run.process.pid, signal.SIGINT)
    run.wait(lambda: "once more ends the run at once" in run.output, "the word")
    os.kill(run.process.pid, signal.SIGINT)
    assert run.code() == 128 + signal.SIGKILL, run.output[-3000:]  # its first evaluation takes longer than both
    run.wait(lambda: not processes_of(str(run.folder)), "everything to be gone", running=False)


@pytest.mark.parametrize(
    ("nproc", "message"),
    [
        ("0", "--nproc=0: must be a number of processes, at least 1, or 'gpu'"),
        ("two", "--nproc=two: must be a number"),
        ("3", "3 processes cannot"),
        ("99999999999999999999", "start at most"),
    ],
)
def test_numbers_of_processes_that_cannot_be(runs: Callable[..., Run], nproc: str, message: str) -> None:
    run = runs(QUICKSTART, f"--nproc={nproc}")
    assert run.code() == 2
    assert message in " ".join(run.output.split())
    assert "Traceback" not in run.output
