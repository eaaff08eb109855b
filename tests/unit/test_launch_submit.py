"""`megatron-fipo submit` before NeMo-Run has its turn: what is checked, and how a missing NeMo-Run is explained."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from megatron_fipo import cli
from megatron_fipo.config import ConfigError, load_config
from megatron_fipo.launch.settings import Settings, SshSettings, load_settings
from megatron_fipo.launch.submit import Request, job_of, submit_or_show

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "examples/quickstart/fipo.yaml")
TWO_NODES = {"nodes": 2, "gpus_per_node": 1}


@pytest.mark.skipif(importlib.util.find_spec("nemo_run") is not None, reason="NeMo-Run is installed here")
def test_without_nemo_run_it_says_how_to_install_it(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["submit", QUICKSTART, "train.resume=true", "--nodes", "2", "--gpus-per-node", "1", "--dry-run"])
    assert status == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "python tools/engines/install.py nemo-run\n" in said.err
    assert "THAT_PYTHON -m megatron_fipo.cli submit" in said.err


def test_every_package_of_nemo_runs_environment_is_pinned() -> None:
    lines = (ROOT / "tools" / "engines" / "nemo-run.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", line) for line in pins), pins
    assert len({line.partition("==")[0] for line in pins}) == len(pins)
    assert "nemo-run==0.11.1" in pins
    versions = dict(line.split("==") for line in pins)
    assert tuple(int(part) for part in versions["leptonai"].split(".")[:2]) < (0, 28)
    assert "torch" not in versions, "the installer gives torch a step of its own"


def test_a_run_that_would_begin_anew_is_not_submitted() -> None:
    with pytest.raises(ConfigError, match=r"train\.resume=false: Slurm may start the job again .*train\.resume=true"):
        submit_or_show(Request(QUICKSTART, flags=TWO_NODES))


def test_the_layout_is_checked_against_nodes_and_gpus() -> None:
    with pytest.raises(ConfigError, match="3 processes cannot hold whole copies of the model: tp=1 x pp=1 x cp=2"):
        submit_or_show(Request(QUICKSTART, ["train.resume=true"], flags={"nodes": 3, "gpus_per_node": 1}))


def test_a_job_that_is_never_saved_on_the_way_is_warned_about(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOT_THERE", raising=False)
    for every, is_warned in (("0", True), ("5", False)):
        overrides = ["train.resume=true", f"checkpoint.every_num_steps={every}"]
        with pytest.raises(ConfigError, match="secrets: NOT_THERE not set in this environment"):
            submit_with_secret(overrides)
        assert ("checkpoint.every_num_steps=0" in capsys.readouterr().err) == is_warned


def submit_with_secret(overrides: list[str]) -> None:
    file = Path("cluster.yaml")
    file.write_text("{nodes: 2, gpus_per_node: 1, secrets: [NOT_THERE]}")
    submit_or_show(Request(QUICKSTART, overrides, cluster=file))


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_on_this_machine_are_made_absolute(in_a_folder: Path) -> None:
    config = load_config(QUICKSTART, ["run.name='a run/with: odd letters'"])
    job = job_of(Request("run.yaml", ["a.b=c d"]), config, Settings(nodes=2))
    assert job.name == "a-run-with-odd-letters"
    assert job.project_dir == str(in_a_folder)
    assert job.job_dir == f"{in_a_folder}/outputs/jobs"
    assert f"-m megatron_fipo.train {in_a_folder}/run.yaml 'a.b=c d'\n" in job.node_script


def test_paths_on_a_remote_cluster_are_left_alone() -> None:
    settings = Settings(ssh=SshSettings(host="login", user="me"), project_dir="/lustre/fipo", job_dir="/lustre/jobs")
    config = load_config(QUICKSTART)
    job = job_of(Request("examples/run.yaml"), config, settings)
    assert job.job_dir == "/lustre/jobs"
    assert "cd /lustre/fipo || exit 2\n" in job.node_script
    assert "-m megatron_fipo.train examples/run.yaml\n" in job.node_script
    for wrong in ("/home/me/run.yaml", "../run.yaml"):
        with pytest.raises(ConfigError, match=r"with ssh\.host, call this from the project's folder"):
            job_of(Request(wrong), config, settings)


def test_the_recipes_settings_are_valid() -> None:
    settings = load_settings(ROOT / "examples/qwen2_5_32b/cluster.yaml", {})
    assert (settings.world_size, settings.time) == (128, "04:00:00")
