"""What colocated servers push out of the GPUs into the host's memory: the actor."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fipo.preflight.memory import StageMemory


def host_memory(stages: Sequence[StageMemory], ranks: int) -> float:
    """GiB of one node while servers have the GPUs of its `ranks`, of the stage that holds most.

    Weights, optimizer state and reference; gradients are dropped. Pinned blocks are as large as what they hold: the
    trainer tells torch's allocator not to round large ones up (torch 2.13 or later).
    """
    return max(stage.weights + stage.optimizer + stage.reference for stage in stages) * ranks
