"""Decides which ranks of a node pack weights for which ranks of servers: those on the same GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_fipo.parallel.groups import subgroup
from megatron_fipo.rollout.servers.cuda_handles import HandleMaker, cuda_handle
from megatron_fipo.rollout.servers.packers import NodeGroup


@dataclass(frozen=True)
class TrainerGpu:
    """The GPU that a rank trains on.

    Attributes:
        name: as CUDA_VISIBLE_DEVICES names it, by number or UUID; "" on a CPU.
        make_handle: makes a handle by which other processes on this GPU can open this rank's memory.
    """

    name: str
    make_handle: HandleMaker = cuda_handle


def visible_gpus() -> list[str]:
    """GPUs of this process, in order, by the names under which any process can be given them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in visible.split(",") if name.strip()]


def own_gpu() -> TrainerGpu:
    """The GPU that this rank trains on."""
    return TrainerGpu(visible_gpus()[torch.cuda.current_device()] if torch.cuda.is_available() else "")


def packers_of_node(
    ranks: Sequence[int], gpu_of: Sequence[str], server_gpus: Sequence[Sequence[str]]
) -> dict[int, str]:
    """The ranks that pack, each with the GPU that it packs on for a server; "" for an owner that packs for none.

    Args:
        ranks: the ranks of the node, of which the first one owns its servers.
        gpu_of: the name of each rank's GPU, by rank.
        server_gpus: the names of the GPUs of each server of the node.

    Raises:
        ValueError: if a server is on a GPU that no rank is on.
    """
    wanted = {gpu for gpus in server_gpus for gpu in gpus}
    packers: dict[int, str] = {}
    for rank in ranks:
        if gpu_of[rank] in wanted and gpu_of[rank] not in packers.values():
            packers[rank] = gpu_of[rank]
    if missing := sorted(wanted - set(packers.values())):
        there = ", ".join(gpu_of[rank] or "none" for rank in ranks)
        raise ValueError(
            f"servers.weight_sync=tensor: a server is handed memory of its own GPU, and no rank of this node is on GPU "
            f"{', '.join(missing)} (the trainer's ranks {ranks[0]} … {ranks[-1]} are on GPU {there}). Start a rank on "
            "each of the servers' GPUs, change servers.gpus, or set servers.weight_sync=distributed for servers on "
            "GPUs of their own."
        )
    packers.setdefault(ranks[0], "")
    return packers


def node_group(packers: dict[int, str], rank: int, gpu: TrainerGpu, timeout_s: float) -> NodeGroup:
    """The group of a node's packers, `rank` being one of them. Collective over these."""
    return NodeGroup(subgroup(sorted(packers), timeout_s), packers[rank], gpu.make_handle)
