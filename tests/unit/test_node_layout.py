"""Which rank packs for which server, and what the trainer's GPU is called."""

from __future__ import annotations

import pytest
import torch

from megatron_fipo.parallel.nodes import node_of
from megatron_fipo.rollout.servers.node_layout import TrainerGpu, own_gpu, packers_of_node, visible_gpus

TWO_NODES = [0, 1, 2, 3, 0, 1, 2, 3]
"""LOCAL_RANK of each rank."""
GPUS = ["0", "1", "2", "3"] * 2


def test_a_node_is_the_ranks_from_its_first_one_on() -> None:
    assert [node_of(rank, TWO_NODES) for rank in (0, 3, 4, 7)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [4, 5, 6, 7],
    ]
    assert node_of(1, [0, 0, 0]) == [1]


def test_ranks_pack_for_the_servers_on_their_own_gpus() -> None:
    assert packers_of_node([0, 1, 2, 3], GPUS, [("0", "1"), ("2", "3")]) == {0: "0", 1: "1", 2: "2", 3: "3"}
    assert packers_of_node([4, 5, 6, 7], GPUS, [("2",)]) == {4: "", 6: "2"}, "the owner packs, and for no server"
    assert packers_of_node([0, 1], ["GPU-a", "GPU-b"], [("GPU-b",), ("GPU-a",)]) == {0: "GPU-a", 1: "GPU-b"}


def test_a_server_on_a_gpu_without_a_rank_is_refused() -> None:
    words = (
        r"^servers\.weight_sync=tensor: .* no rank of this node is on GPU 5, 6 \(the trainer's ranks 4 … 7 are on GPU "
        r"0, 1, 2, 3\)\. .*servers\.weight_sync=distributed"
    )
    with pytest.raises(ValueError, match=words):
        packers_of_node([4, 5, 6, 7], GPUS, [("2",), ("5", "6")])


def test_gpus_go_by_the_names_that_any_process_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932, 3")
    assert visible_gpus() == ["GPU-8932", "3"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert own_gpu() == TrainerGpu("3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert visible_gpus() == ["0", "1"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert own_gpu().name == ""
