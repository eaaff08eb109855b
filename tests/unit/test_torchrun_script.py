"""How a recipe's script decides what to start, from its arguments and its environment."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo.config import load_config, validate
from megatron_fipo.launch import torchrun_script
from megatron_fipo.launch.tiny import TINY_RANKS, tiny_overrides
from megatron_fipo.launch.torchrun_script import (
    Arguments,
    Nodes,
    is_rank,
    main,
    nodes_of,
    parse,
    torchrun_options,
    without_torchrun,
)

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples/qwen2_5_32b/fipo.yaml"

ONE_PROCESS = {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"} | {
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
"""What `torchrun run.sh` sets."""


class Became(Exception):  # noqa: N818 - no error: it stands for exec, which does not return
    """What the process would have become."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        super().__init__(command)
        self.command, self.environment = command, environment


@pytest.fixture(autouse=True)
def exec_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def become(program: str, command: list[str], environment: dict[str, str]) -> None:
        assert command[0] == program
        raise Became(command, environment)

    monkeypatch.setattr(os, "execve", become)
    for name in (*ONE_PROCESS, "NNODES", "NODE_RANK", "GPUS_PER_NODE", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def started(*argv: str) -> Became:
    with pytest.raises(Became) as caught:
        main(RECIPE, argv, planned_nodes=16)
    return caught.value


def test_arguments() -> None:
    assert parse(["train.num_steps=1", "--dry-run", "model=tiny", "--gpu", "h200"]) == Arguments(
        ("train.num_steps=1",), dry_run=True, gpu="h200", is_tiny=True
    )
    assert parse(["--gpu=h200"]).gpu == "h200"
    assert parse(["data.train.x.prompt_template=a=b"]).overrides == ("data.train.x.prompt_template=a=b",)
    for argv in (["--dryrun"], ["train.num_steps"], ["-h"], ["--help"]):
        with pytest.raises(ValueError, match=r"usage: run\.sh"):
            parse(argv)


def test_from_bash_it_starts_torchrun_with_a_process_for_each_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("NNODES", "16"), ("NODE_RANK", "3"), ("MASTER_ADDR", "node0"), ("GPUS_PER_NODE", "8")):
        monkeypatch.setenv(name, value)
    became = started("train.num_steps=7")
    assert became.command[1:] == [
        *("-m", "torch.distributed.run", "--nnodes", "16", "--node-rank", "3"),
        *("--master-addr", "node0", "--master-port", "29501", "--nproc-per-node", "8"),
        *("-m", "megatron_fipo.train", str(RECIPE), "train.num_steps=7"),
    ]
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert "1234" in started().command


def test_from_torchrun_with_one_process_it_starts_torchrun_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)
    became = started("model=tiny")
    assert became.command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    assert not ONE_PROCESS.keys() & became.environment.keys(), "the new torchrun must not take itself for a rank"
    assert became.environment["PATH"] == os.environ["PATH"]


def test_a_rank_of_the_run_becomes_the_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (ONE_PROCESS | {"LOCAL_WORLD_SIZE": "8", "LOCAL_RANK": "5"}).items():
        monkeypatch.setenv(name, value)
    became = started("train.num_steps=7")
    assert became.command[1:] == ["-m", "megatron_fipo.train", str(RECIPE), "train.num_steps=7"]
    assert became.environment["LOCAL_RANK"] == "5"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        (ONE_PROCESS | {"GPUS_PER_NODE": "8"}, False),
        (ONE_PROCESS | {"GPUS_PER_NODE": "1"}, True),  # one GPU a node: this is its process
        (ONE_PROCESS | {"GPUS_PER_NODE": "1", "NNODES": "2"}, False),  # this torchrun knows of one node only
        (ONE_PROCESS | {"GPUS_PER_NODE": "1", "NNODES": "2", "GROUP_WORLD_SIZE": "2"}, True),
        (ONE_PROCESS | {"LOCAL_WORLD_SIZE": "4", "GPUS_PER_NODE": "8"}, True),  # the user's own number
    ],
)
def test_who_is_a_rank(environment: dict[str, str], expected: bool) -> None:
    assert is_rank(environment, is_tiny=False) is expected


def test_ranks_of_other_nodes_than_the_user_says_are_refused() -> None:
    with pytest.raises(ValueError, match="NNODES=16, but torchrun was started for 1 with 8 processes"):
        is_rank(ONE_PROCESS | {"LOCAL_WORLD_SIZE": "8", "NNODES": "16"}, is_tiny=False)


def test_nodes_that_the_outer_torchrun_joined_stay_joined() -> None:
    """torchrun --nnodes 4 run.sh: the same first node, and the port beside the outer one's."""
    outer = ONE_PROCESS | {"GROUP_WORLD_SIZE": "4", "GROUP_RANK": "2", "MASTER_ADDR": "first", "MASTER_PORT": "6000"}
    assert nodes_of(outer | {"GPUS_PER_NODE": "8"}, is_tiny=False) == Nodes(4, 2, 8, "first", 6001)


def test_under_torchrun_the_users_own_address_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun overwrites MASTER_ADDR for what it starts; the user's is in torchrun's environment."""
    users = {"NNODES": "16", "NODE_RANK": "5", "MASTER_ADDR": "first", "MASTER_PORT": "29500"}
    monkeypatch.setattr(torchrun_script, "environment_before_torchrun", lambda: users)
    found = nodes_of(ONE_PROCESS | users | {"MASTER_ADDR": "localhost", "GPUS_PER_NODE": "8"}, is_tiny=False)
    assert found == Nodes(16, 5, 8, "first", 29501), "29500 is taken by the outer torchrun"


def test_the_environment_of_the_parent_is_read() -> None:
    assert torchrun_script.environment_before_torchrun().get("PATH")


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"NNODES": "sixteen"}, "NNODES=sixteen: must be a whole number of at least 1"),
        ({"NNODES": "0"}, "NNODES=0"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2: must be below NNODES=2"),
        ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
        ({"GPUS_PER_NODE": "-1"}, "GPUS_PER_NODE=-1"),
    ],
)
def test_a_wrong_environment_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nodes_of({"GPUS_PER_NODE": "8"} | environment, is_tiny=False)


def test_what_cannot_run_is_said_once_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GPUS_PER_NODE", "8")
    assert main(RECIPE, []) == 2
    assert "8 processes cannot hold whole copies of the model" in capsys.readouterr().err
    assert main(RECIPE, ["parallel.tpp=2"]) == 2
    assert "tpp" in capsys.readouterr().err
    assert main(RECIPE, ["--nonsense"]) == 2
    assert "usage:" in capsys.readouterr().err


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(RECIPE, []) == 2
    assert "Set GPUS_PER_NODE, try model=tiny" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert torchrun_script.processes_per_node(os.environ, is_tiny=False) == 3


def test_one_node_needs_no_agreed_port() -> None:
    assert torchrun_options(Nodes(1, 0, 8, "127.0.0.1", 29501)) == ["--standalone", "--nproc-per-node", "8"]


def test_only_what_torchrun_sets_is_removed() -> None:
    kept: dict[str, Any] = {"PATH": "x", "MODEL_PATH": "y", "NNODES": "2"}
    assert without_torchrun(kept | ONE_PROCESS) == kept


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("examples/qwen2_5_*/[fd]*.yaml")), ids=str)
def test_tiny_runs_any_recipe_and_keeps_its_objective(recipe: Path) -> None:
    full, tiny = load_config(recipe), load_config(recipe, tiny_overrides(recipe))
    validate(tiny, TINY_RANKS)
    assert tiny.objective == full.objective
    assert tiny.optimizer == full.optimizer
    assert tiny.sampling == full.sampling
    assert tiny.algorithm == full.algorithm
    assert Path(tiny.model.path).is_dir()
