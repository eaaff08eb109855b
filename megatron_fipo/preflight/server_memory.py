"""Memory of a rollout server: its weights, and the pool of keys and values whose size it chooses when it starts.

SGLang and vLLM size the pool by what is free then. Colocated servers start while the actor's memory is lent, before the
first collective makes NCCL take its buffers, so that it is all but the trainer's CUDA context. One that starts again
later finds less by those.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.preflight.hardware import GIB, Gpu
from megatron_fipo.preflight.memory import (
    CONTEXT_GIB,
    RESERVE_GIB,
    SERVER_CONTEXT_GIB,
    SERVER_GRAPHS_GIB,
    WEIGHT_BYTES,
)
from megatron_fipo.preflight.parameters import whole_parameters
from megatron_fipo.preflight.rollout_plan import RolloutPlan

ACTIVATIONS_GIB = 3.0
"""Activations of a server that prefills a chunk of 8,192 tokens while it decodes and samples."""


@dataclass(frozen=True)
class ServerMemory:
    """A rollout server's share of one GPU.

    Attributes:
        weights: GiB on each of its GPUs.
        pool: GiB left for keys and values.
        bytes_per_token: bytes of one token's keys and values on one GPU.
        beside: GiB of what else it takes: its context, CUDA graphs and activations; 0 in process, where the trainer's
            reserve stands for it.
    """

    weights: float
    pool: float
    bytes_per_token: int
    beside: float

    @property
    def pool_tokens(self) -> int:
        """Tokens whose keys and values fit at a time."""
        return max(int(self.pool * GIB / self.bytes_per_token), 0)


def server_memory(config: Config, shape: ModelShape, gpu: Gpu, rollout: RolloutPlan, lasting: float) -> ServerMemory:
    """Memory of one server, or of the engine in a trainer's process beside `lasting` GiB of the actor."""
    servers, size = config.servers, WEIGHT_BYTES[config.model.dtype]
    groups = max(shape.num_query_groups // rollout.tp, 1)
    per_token = 2 * shape.num_layers * groups * shape.head_dim * size
    weights = whole_parameters(shape) * size / rollout.tp / GIB
    if config.rollout.engine == "in_process":
        return ServerMemory(weights, gpu.memory_gib - lasting - RESERVE_GIB - weights, per_token, 0.0)
    pool = _pool_gib(config, gpu, rollout, weights)
    if servers.max_total_tokens is not None:
        pool = min(pool, servers.max_total_tokens * per_token / GIB)
    return ServerMemory(weights, pool, per_token, SERVER_CONTEXT_GIB + SERVER_GRAPHS_GIB + ACTIVATIONS_GIB)


def free_at_start_gib(gpu: Gpu, rollout: RolloutPlan) -> float:
    """Memory that is free on a GPU when a server has its CUDA context and is about to load its weights."""
    return gpu.memory_gib - SERVER_CONTEXT_GIB - (CONTEXT_GIB if rollout.is_colocated else 0.0)


def _pool_gib(config: Config, gpu: Gpu, rollout: RolloutPlan, weights: float) -> float:
    """SGLang leaves 1 - memory_fraction of what was free before it loaded its weights, for graphs and activations; vLLM
    takes memory_fraction of the whole GPU, graphs and activations included.

    Where memory is not to be released (dedicated servers), SGLang sizes the pool once more when its CUDA graphs have
    been captured, and they come out of it. Sources: SGLang 0.5.23, `_profile_available_bytes` in
    mem_cache/kv_cache_configurator.py, `compute_post_capture_kv_resize`, and `post_capture_kv_sizing_planned`, which
    enable_memory_saver turns off; vLLM, `request_memory` in v1/worker/utils.py and `determine_available_memory` in
    v1/worker/gpu_worker.py.
    """
    fraction = config.servers.memory_fraction
    if config.rollout.engine == "vllm":
        return fraction * gpu.memory_gib - weights - SERVER_GRAPHS_GIB - ACTIVATIONS_GIB
    free = free_at_start_gib(gpu, rollout)
    graphs = 0.0 if rollout.is_colocated else SERVER_GRAPHS_GIB
    return free - weights - (1 - fraction) * free - graphs
