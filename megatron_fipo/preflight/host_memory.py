"""What a run keeps in a node's host memory: the actor, pushed out of the GPUs, and weights on their way to disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.preflight.hardware import GIB
from megatron_fipo.preflight.memory import WEIGHT_BYTES, StageMemory
from megatron_fipo.preflight.parameters import whole_parameters
from megatron_fipo.preflight.rollout_plan import RolloutPlan


@dataclass(frozen=True)
class HostMemory:
    """GiB of one node.

    Attributes:
        actor: while colocated servers have the GPUs, on the node that holds most; 0 where they have GPUs of their own.
        snapshot: on the first node, the copy of the weights that is written to disk while the run goes on; 0 where no
            snapshot is kept. It is pinned, so that it stays reserved from one update to the next.
    """

    actor: float
    snapshot: float


def host_memory(
    config: Config, shape: ModelShape, stages: Sequence[StageMemory], rollout: RolloutPlan, ranks: int
) -> HostMemory:
    """Host memory of nodes of `ranks` GPUs.

    Of the actor these are weights, optimizer state and reference; gradients are dropped. Pinned blocks are as large as
    what they hold: the trainer tells torch's allocator not to round large ones up (torch 2.13 or later).
    """
    actor = max(stage.weights + stage.optimizer + stage.reference for stage in stages) * ranks
    keeps_snapshot = config.rollout.engine != "in_process" and config.servers.keep_snapshot
    snapshot = whole_parameters(shape) * WEIGHT_BYTES[config.model.dtype] / GIB
    return HostMemory(actor if rollout.is_colocated else 0.0, snapshot if keeps_snapshot else 0.0)
