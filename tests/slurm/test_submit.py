"""`megatron-fipo submit` against a real Slurm: the quick-start on two nodes, one rank on each, CP 2 across them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.end_to_end.runs import (
    QUICKSTART,
    ROOT,
    differing,
    exported_weights,
    latest_checkpoint_name,
    step_lines,
    timeless,
)
from tests.engines.environments import server_python
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import SubmittedRun, Submitter

pytestmark = pytest.mark.slurm

NUM_STEPS = 10
PATIENCE_S = 900.0
SECRET_NAME, SECRET = "MEGATRON_FIPO_TEST_SECRET", "hunter2-5f0c"


@pytest.fixture(scope="module")
def submit(cluster: Cluster, nemo_run_python: str, tmp_path_factory: pytest.TempPathFactory) -> Submitter:
    return Submitter(cluster, nemo_run_python, tmp_path_factory.mktemp("submitted"), {SECRET_NAME: SECRET})


@pytest.fixture(scope="module")
def uninterrupted(submit: Submitter) -> SubmittedRun:
    """A run that nothing happens to."""
    run = submit("uninterrupted", f"train.num_steps={NUM_STEPS}", secrets=[SECRET_NAME])
    run.wait_for_end("COMPLETED")
    return run


def test_the_dry_run_submits_nothing_and_shows_both_scripts(submit: Submitter) -> None:
    text = submit.command("dry", dry_run=True, secrets=[SECRET_NAME])
    assert "#SBATCH --nodes=2\n" in text
    assert "#SBATCH --signal=USR1@60\n" in text
    assert "-m torch.distributed.run --nnodes 2 --nproc-per-node 1" in text
    assert SECRET not in text
    assert submit.cluster.run("squeue", "-h") == ""
    assert not (submit.folder / "dry").exists()


def test_two_nodes_train_to_the_end(uninterrupted: SubmittedRun) -> None:
    assert uninterrupted.accounting("NNodes,ExitCode") == "2|0:0"
    assert [line["step"] for line in step_lines(uninterrupted.folder)] == list(range(NUM_STEPS))
    assert exported_weights(uninterrupted.folder)
    log = uninterrupted.log()
    assert f"{NUM_STEPS - 1}/{NUM_STEPS}" in log
    assert "\x1b" not in log, "a log file is no terminal"


def test_a_secret_reaches_the_run_and_no_file(uninterrupted: SubmittedRun) -> None:
    # The run has ended well, and it would not have begun without the variable: see the node's script.
    scripts = list(uninterrupted.logs.glob("scripts/*.sh"))
    assert len(scripts) == 1
    assert f"for name in {SECRET_NAME}; do" in scripts[0].read_text()
    assert files_holding(SECRET, uninterrupted.folder.parent) == []
    (uninterrupted.folder / "note").write_text(SECRET)  # the search does find what is there
    assert files_holding(SECRET, uninterrupted.folder.parent) == [uninterrupted.folder / "note"]


def test_a_requeued_run_ends_like_an_uninterrupted_one(submit: Submitter, uninterrupted: SubmittedRun) -> None:
    run = submit("requeued", f"train.num_steps={NUM_STEPS}", "checkpoint.every_num_steps=3")
    # The signal that precedes the time limit: the run saves, leaves, and has itself queued again.
    run.wait_until(lambda: run.num_steps() >= 2, "two steps")
    run.cluster.run("scancel", "--signal=USR1", run.number)
    run.wait_until(lambda: "resumed from" in run.log(1), "the run goes on")
    assert "the time limit is near" in run.log(0)
    assert "stopped by a signal" in run.log(0)
    # What preemption does: SIGTERM to every process, SIGKILL later.
    steps_before = run.num_steps()
    run.wait_until(lambda: run.num_steps() > steps_before, "another step")
    run.cluster.run("scontrol", "requeue", run.number)
    run.wait_for_end("REQUEUED", "REQUEUED", "COMPLETED")
    assert "resumed from" in run.log(2)

    assert [timeless(line) for line in step_lines(run.folder)] == [
        timeless(line) for line in step_lines(uninterrupted.folder)
    ]
    weights, expected = exported_weights(run.folder), exported_weights(uninterrupted.folder)
    assert differing(weights, expected) == []
    name = next(iter(weights))
    flipped = weights[name].view(torch.int32)
    flipped[(0,) * flipped.dim()] ^= 1
    assert differing(weights, expected) == [name], "one bit is enough to be noticed"


def test_the_time_limit_saves_and_a_cancelled_run_stays_cancelled(submit: Submitter) -> None:
    run = submit("limited", "train.num_steps=100000", time="2", signal_before_end_s=30)
    run.wait_until(lambda: "REQUEUED" in run.states(), "queued again before the limit")
    assert "stopped by a signal" in run.log(0)
    saved = latest_checkpoint_name(run.folder)
    assert int(saved.split("_")[1]) == run.num_steps(), "the newest step is saved"

    run.wait_until(lambda: f"{saved}: " in run.log(1), "the run goes on from what was saved")
    run.cluster.run("scancel", run.number)
    run.wait_for_end("REQUEUED", "CANCELLED")


def test_each_node_generates_on_a_server_of_its_own_and_another_one_joins(submit: Submitter) -> None:
    """In a step of the job, beside that which trains.

    Skipped where tools/engines/install.py has not installed SGLang.
    """
    overrides = ("rollout.engine=sglang", f"servers.python={server_python('sglang')}")
    run = submit("served", "train.num_steps=100000", *overrides, time="30")
    run.wait_until(lambda: run.num_steps() >= 2, "two steps", timeout_s=PATIENCE_S)  # starting two servers takes most
    logs = sorted((run.folder / "servers").glob("rank-*/sglang-0.log"))
    assert [log.parent.name for log in logs] == ["rank-0", "rank-1"]
    for log in logs:
        assert '"POST /generate HTTP/1.1" 200' in log.read_text()

    step = ("srun", f"--jobid={run.number}", "--overlap", "--nodes=1", "--ntasks=1")
    serve = (sys.executable, "-m", "megatron_fipo.cli", "serve", QUICKSTART, f"run.output_dir={run.folder}")
    command = [*step, *serve, *overrides, "--host", "127.0.0.1"]
    with subprocess.Popen(command, cwd=ROOT, env=dict(submit.cluster.environment)) as serving:
        try:
            run.wait_until(lambda: num_servers(run) == 3, "another server", timeout_s=PATIENCE_S)
            (log,) = (run.folder / "servers").glob("joined-*/sglang-0.log")
            run.wait_until(lambda: '"POST /generate HTTP/1.1" 200' in log.read_text(), "its first response")
            # To the command itself: a signal to srun would kill the step, and so does scancel of a step.
            os.kill(int(log.parent.name.rpartition("-")[2]), signal.SIGTERM)
            serving.wait(PATIENCE_S)
        finally:
            serving.kill()
    run.wait_until(lambda: num_servers(run) == 2, "it has left")
    assert list((run.folder / "servers" / "joined").iterdir()) == []
    run.cluster.run("scancel", run.number)
    run.wait_for_end("CANCELLED")


def num_servers(run: SubmittedRun) -> float:
    """Servers that held the weights in the last step that has been logged."""
    return float(step_lines(run.folder)[-1]["weight_sync/servers"])


def files_holding(text: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]
