"""What colocated servers push out of the GPUs into the host's memory: the actor, in pinned blocks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.preflight.hardware import GIB
from megatron_fipo.preflight.memory import WEIGHT_BYTES, StageMemory
from megatron_fipo.preflight.parameters import StageParameters, stage_parameters


@dataclass(frozen=True)
class HostMemory:
    """Of one node, GiB.

    Attributes:
        kept: weights, optimizer and reference of its ranks; gradients are dropped.
        pinned: the blocks that torch takes for them, each rounded up to a power of two of bytes, as it does unless
            PYTORCH_CUDA_ALLOC_CONF sets pinned_max_round_threshold_mb.
    """

    kept: float
    pinned: float


def host_memory(config: Config, shape: ModelShape, stages: list[StageMemory], ranks: int) -> HostMemory:
    """While servers have the GPUs of a node's `ranks`, of the stage that holds most."""
    kept = max(stage.weights + stage.optimizer + stage.reference for stage in stages)
    pinned = max(
        _pinned_bytes(config, shape, part, stage)
        for part, stage in zip(stage_parameters(shape, config.parallel), stages, strict=True)
    )
    return HostMemory(kept * ranks, pinned * ranks / GIB)


def _pinned_bytes(config: Config, shape: ModelShape, part: StageParameters, stage: StageMemory) -> float:
    """A block for each storage. The optimizer's are one a parameter, and a rank has some whole parameters, so that
    their mean is what counts. Weights are one buffer where the optimizer shards it, else one a parameter, too."""
    size, tp = WEIGHT_BYTES[config.model.dtype], config.parallel.tp
    heads = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim
    attention = [shape.hidden_size * heads / tp, shape.hidden_size * shape.num_attention_heads * shape.head_dim / tp]
    mlp = [2 * shape.hidden_size * shape.ffn_hidden_size / tp, shape.hidden_size * shape.ffn_hidden_size / tp]
    matrices = [*attention, *mlp] * part.num_layers
    rows = shape.padded_vocab_size(tp) // tp
    vocabulary = part.parameters - sum(matrices)  # and norms and biases, which are next to nothing
    matrices += [rows * shape.hidden_size] * round(vocabulary / (rows * shape.hidden_size))

    def grown(size: int) -> float:
        """How many times larger the blocks are than numbers of `size` bytes."""
        return sum(_power_of_two(size * number) for number in matrices) / sum(size * number for number in matrices)

    sharded = config.optimizer.distributed
    weights = _power_of_two(stage.weights * GIB) if sharded else stage.weights * GIB * grown(size)
    float32 = 4  # moments and main weights
    return weights + GIB * (stage.optimizer * grown(float32) + stage.reference * grown(size))


def _power_of_two(num_bytes: float) -> float:
    return 2.0 ** math.ceil(math.log2(num_bytes))
