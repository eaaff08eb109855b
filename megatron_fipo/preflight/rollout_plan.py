"""Where responses are generated: on which GPUs, by servers of what size, with how much of the memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fipo.config import Config


@dataclass(frozen=True)
class RolloutPlan:
    """Placement of the rollout engine.

    Attributes:
        label: the placement in words, for the reader.
        tp: GPUs of one server, or 1 in process.
        num_gpus: number of GPUs that generate.
        num_nodes: number of nodes that hold the trainer's GPUs.
        is_dedicated: whether other GPUs than the trainer's generate.
        is_colocated: whether servers and the trainer share GPUs, taking turns.
        memory_fraction: share of a GPU's memory that a server may take at most.
    """

    label: str
    tp: int
    num_gpus: int
    num_nodes: int
    is_dedicated: bool
    is_colocated: bool
    memory_fraction: float


def rollout_plan(config: Config, world_size: int, gpus_per_node: int) -> RolloutPlan:
    """Placement for `world_size` training GPUs."""
    servers = config.servers
    if config.rollout.engine == "in_process":
        nodes = math.ceil(world_size / gpus_per_node)
        return RolloutPlan("in the trainer's processes", 1, world_size, nodes, False, False, 1.0)
    is_dedicated = servers.placement == "dedicated"
    per_node = servers.num_per_node * servers.tp
    if servers.urls:
        nodes = math.ceil(world_size / gpus_per_node)
        label = f"{len(servers.urls)} running servers, taken for {servers.tp} GPUs each"
        return RolloutPlan(
            label, servers.tp, len(servers.urls) * servers.tp, nodes, True, False, servers.memory_fraction
        )
    training_per_node = gpus_per_node - per_node if is_dedicated else gpus_per_node
    nodes = math.ceil(world_size / max(training_per_node, 1))
    where = "on GPUs of their own" if is_dedicated else "on the trainer's GPUs"
    label = f"{servers.num_per_node} a node, {where}"
    return RolloutPlan(
        label, servers.tp, nodes * per_node, nodes, is_dedicated, not is_dedicated, servers.memory_fraction
    )


def placement_problems(config: Config, plan: RolloutPlan, world_size: int, gpus_per_node: int) -> Iterator[str]:
    """Find what is impossible in the placement."""
    servers = config.servers
    if config.rollout.engine == "in_process" or servers.urls:
        return
    per_node = servers.num_per_node * servers.tp
    if per_node > gpus_per_node or (plan.is_dedicated and per_node == gpus_per_node):
        rest = " and leave none to the trainer" if plan.is_dedicated else ""
        yield (
            f"servers.num_per_node={servers.num_per_node} x servers.tp={servers.tp} take {per_node} of a node's "
            f"{gpus_per_node} GPUs{rest}. Lower them."
        )
    elif not plan.is_dedicated and per_node < min(gpus_per_node, world_size):
        yield (
            f"servers.num_per_node={servers.num_per_node} x servers.tp={servers.tp} use {per_node} of a node's "
            f"{gpus_per_node} GPUs: the others wait while responses are generated. Raise servers.num_per_node."
        )
