"""Memory of one GPU while it trains and while it generates, by pipeline stage.

Weights, gradients and optimizer state are exact, and activations in float32 nearly so: tests hold them against real
actors on a CPU. In bfloat16 activations are what Transformer Engine's layers keep, by their source. The reserve stands
for what no formula gives. With model.fp8 the products' inputs are kept in FP8, which these numbers do not count on.

Shapes: T tokens of a microbatch on one context-parallel rank, H hidden size, F width of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config import Config, log_prob_chunk_tokens
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.preflight.hardware import GIB
from megatron_fipo.preflight.parameters import StageParameters, stage_parameters, whole_parameters

RESERVE_GIB = 6.0
"""CUDA context, NCCL buffers, kernels' workspace, and what the allocator loses to fragmentation."""
GRADIENT_BYTES = 4
"""Gradients are summed and reduced in float32."""
STATE_BYTES = {"float32": 8, "bfloat16": 12}
"""Adam's two moments; in bfloat16 also the float32 main weights."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
SERVER_RESERVE_GIB = 3.0
"""What a server takes beyond weights and cache: its CUDA context, graphs and activations."""
SERVER_RESIDUE_GIB = 2.0
"""What of that stays on the GPU when a colocated server has released its memory for an update."""


@dataclass(frozen=True)
class StageMemory:
    """GiB on each GPU of one pipeline stage."""

    stage: int
    parameters: int
    weights: float
    gradients: float
    optimizer: float
    reference: float
    """The frozen policy of a KL penalty."""
    activations: float
    """Kept for backward, of all microbatches in flight, with one layer's working set."""
    log_probs: float
    """Logits of a chunk, the output layer's gradient, gathered hidden states: where the pipeline ends."""
    rollout_engine: float
    """What the engine keeps meanwhile: in process its whole model, of a colocated server what it cannot release."""
    reserve: float = RESERVE_GIB

    @property
    def training(self) -> float:
        """All of it, at the peak of an update."""
        held = self.weights + self.gradients + self.optimizer + self.reference + self.rollout_engine
        return held + self.activations + self.log_probs + self.reserve


def training_memory(config: Config, shape: ModelShape, world_size: int) -> list[StageMemory]:
    """At the peak of an update, for every pipeline stage."""
    parallel, dtype = config.parallel, config.model.dtype
    data_ranks = world_size // (parallel.tp * parallel.pp)  # data and context parallel: those with the same weights
    shards = data_ranks if config.optimizer.distributed else 1
    engine = 0.0
    if config.rollout.engine == "in_process":
        engine = WEIGHT_BYTES[dtype] * whole_parameters(shape) / GIB
    elif config.servers.placement == "colocated":
        engine = SERVER_RESIDUE_GIB
    stages = []
    for part in stage_parameters(shape, parallel):
        stages.append(
            StageMemory(
                stage=part.stage,
                parameters=part.parameters,
                weights=part.parameters * WEIGHT_BYTES[dtype] / GIB,
                gradients=part.parameters * GRADIENT_BYTES / GIB,
                optimizer=part.parameters * STATE_BYTES[dtype] / shards / GIB,
                reference=part.parameters * WEIGHT_BYTES[dtype] / GIB if config.objective.kl_coefficient else 0.0,
                activations=_activations(config, shape, part) / GIB,
                log_probs=_log_probs(config, shape, part) / GIB,
                rollout_engine=engine,
            )
        )
    return stages


def layer_activation_bytes(config: Config, shape: ModelShape) -> tuple[float, float]:
    """(all that one layer keeps for the backward pass, its input alone), bytes per token on one tensor-parallel rank.

    Kept of a layer, in units of one number per token: the inputs of both norms and their outputs (4 H; sharded by
    sequence parallelism alone), the projection's queries, keys and values, the rotated queries and keys with the
    cosines and sines of both, the attention's output, both halves of the MLP's first product (2 F) and what it makes of
    them (F); float32 statistics of the attention, one a head. In float32, where layers are not Transformer Engine's
    fused ones, also the normalised inputs (2 H), one half of the MLP's after its activation (F), a copy of the values,
    and keys and values repeated for each query head.
    """
    size, tp = WEIGHT_BYTES[config.model.dtype], config.parallel.tp
    sequence_shards = tp if config.parallel.sequence_parallel else 1
    heads, groups, width = shape.num_attention_heads, shape.num_query_groups, shape.head_dim
    replicated = 4 * shape.hidden_size / sequence_shards + 4 * width
    attention = (heads + 2 * groups) * width + (heads + groups) * width + heads * width
    inner = (attention + 3 * shape.ffn_hidden_size) / tp
    if config.model.dtype == "float32":
        replicated += 2 * shape.hidden_size / sequence_shards
        inner += (shape.ffn_hidden_size + (2 * heads + groups) * width) / tp
    return size * (replicated + inner) + 4 * heads / tp, size * shape.hidden_size / sequence_shards


def microbatches_in_flight(config: Config, stage: int) -> float:
    """Microbatches whose activations a stage holds at a time: one forward, one backward, from the last stage up.

    Interleaved, the first stage holds (pp - 1) / (pp * virtual_pp) more. Source: Narayanan et al., arXiv 2104.04473;
    Korthikanti et al., arXiv 2205.05198, section 4.2.3.
    """
    parallel = config.parallel
    in_flight = float(parallel.pp - stage)
    if parallel.virtual_pp:
        in_flight *= 1 + (parallel.pp - 1) / (parallel.pp * parallel.virtual_pp)
    return in_flight


def _activations(config: Config, shape: ModelShape, part: StageParameters) -> float:
    tokens = config.batch.max_tokens_per_microbatch / config.parallel.cp
    kept, layer_input = layer_activation_bytes(config, shape)
    # Selective recompute drops the attention's scores, which flash attention never keeps.
    per_layer = layer_input if config.model.recompute == "full" else kept
    # In one layer's backward: what is kept of it (recomputed), and gradients of the MLP's three widest tensors.
    gradients = WEIGHT_BYTES[config.model.dtype] * (3 * shape.ffn_hidden_size / config.parallel.tp)
    working = gradients + 2 * layer_input + (kept if config.model.recompute == "full" else 0)
    return tokens * (per_layer * part.num_layers * microbatches_in_flight(config, part.stage) + working)


def _log_probs(config: Config, shape: ModelShape, part: StageParameters) -> float:
    """Bytes that `parallel.vocab_log_probs` takes on a GPU: a chunk's logits in float32 and, unless that takes their
    place, their gradient in the model's dtype; what stands for the output layer's gradient in autograd, since the
    gradient itself is summed in Megatron's buffer; hidden states and their gradient, gathered over tp."""
    if not part.output_rows:
        return 0.0
    size = WEIGHT_BYTES[config.model.dtype]
    tokens = config.batch.max_tokens_per_microbatch / config.parallel.cp
    chunk = min(log_prob_chunk_tokens(config.model.log_prob_chunk_mib, part.output_rows), tokens)
    logits = chunk * part.output_rows * (4 if size == 4 else 4 + size)
    gradient = part.output_rows * shape.hidden_size * size
    return logits + gradient + tokens * (2 * size * shape.hidden_size + 5 * 4)


@dataclass(frozen=True)
class ServerMemory:
    """A rollout server's share of one GPU.

    Attributes:
        weights: GiB on each of its GPUs.
        pool: GiB left for keys and values.
        bytes_per_token: of keys and values on one GPU.
    """

    weights: float
    pool: float
    bytes_per_token: int

    @property
    def pool_tokens(self) -> int:
        """Tokens whose keys and values fit at a time."""
        return max(int(self.pool * GIB / self.bytes_per_token), 0)


def on_the_way_gib(config: Config, shape: ModelShape) -> float:
    """Of a handover of weights: two buckets, and the largest tensor, whole and in its parts."""
    largest = shape.vocab_size * shape.hidden_size * WEIGHT_BYTES[config.model.dtype] / GIB
    return 2 * config.servers.bucket_mib / 1024 + 2 * largest


def server_memory(shape: ModelShape, dtype: str, tp: int, available_gib: float) -> ServerMemory:
    """What a server of tensor-parallel size `tp` makes of `available_gib` for weights and cache on each of its GPUs."""
    size = WEIGHT_BYTES[dtype]
    groups = max(shape.num_query_groups // tp, 1)
    per_token = 2 * shape.num_layers * groups * shape.head_dim * size
    weights = whole_parameters(shape) * size / tp / GIB
    return ServerMemory(weights, available_gib - weights, per_token)
