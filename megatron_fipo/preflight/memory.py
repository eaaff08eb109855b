"""Memory of one training GPU at the peak of an update, by pipeline stage.

Weights, gradients and optimizer state are exact, and activations in float32 nearly so: tests hold them against real
actors on a CPU. In bfloat16 activations are what Transformer Engine's layers keep, by their source (2.20). The reserve
stands for what no formula gives. With model.fp8 the products' inputs are kept in FP8, which these numbers do not count
on; the FP8 copies of the weights they do count.

Shapes: T tokens of a microbatch on one context-parallel rank, H hidden size, F width of the MLP, and of a head d.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config import Config, log_prob_chunk_tokens, recomputed_part
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.preflight.hardware import GIB, GPUS, Gpu
from megatron_fipo.preflight.parameters import StageParameters, layer_matrices, stage_parameters, whole_parameters

CONTEXT_GIB = 0.5
"""A process's CUDA context: all that a trainer holds of its GPU when its model's memory is lent for the first time."""
RESIDUE_GIB = 3.0
"""Memory that stays on the GPU of a trainer whose model is in host memory: context, NCCL's buffers, rotary tables."""
RESERVE_GIB = 6.0
"""The residue in training, the kernels' workspace, and what the allocator loses to fragmentation."""
GRADIENT_BYTES = 4
"""Gradients are summed and reduced in float32."""
STATE_BYTES = {"float32": 8, "bfloat16": 12}
"""Adam's two moments; in bfloat16 also the float32 main weights."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2}
SERVER_CONTEXT_GIB = 1.0
"""A rollout server's CUDA context and NCCL's buffers, which are there before it loads its weights."""
SERVER_GRAPHS_GIB = 1.0
"""A server's CUDA graphs: SGLang counts 2 MiB for each sequence that it decodes at a time and 8 MiB for each of its
sizes of prefill, about 60."""
SERVER_RESIDUE_GIB = SERVER_CONTEXT_GIB + SERVER_GRAPHS_GIB
"""Memory that stays on the GPU when a colocated server has released weights and cache."""


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
    fp8_weights: float
    """The weights' FP8 copies, which are made in forward and kept for backward, of all microbatches in flight."""
    log_probs: float
    """Logits of a chunk, the output layer's gradient, gathered hidden states: where the pipeline ends."""
    rollout_engine: float
    """Memory of the engine during training: in process the whole model; of a colocated server what it cannot free."""
    reserve: float = RESERVE_GIB

    @property
    def lasting(self) -> float:
        """What the actor keeps from one update to the next."""
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def training(self) -> float:
        """All of it, at the peak of an update."""
        passing = self.activations + self.fp8_weights + self.log_probs
        return self.lasting + passing + self.rollout_engine + self.reserve


def training_memory(
    config: Config, shape: ModelShape, world_size: int, gpu: Gpu = GPUS["h100-80gb"]
) -> list[StageMemory]:
    """Memory at the peak of an update, for every pipeline stage. The GPU decides how many FP8 copies a weight needs."""
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
                fp8_weights=_fp8_weights(config, shape, part, gpu) / GIB,
                log_probs=_log_probs(config, shape, part) / GIB,
                rollout_engine=engine,
            )
        )
    return stages


def recomputes_mlp(config: Config) -> bool:
    """Whether the MLP's activations are computed again in backward, on GPUs, rather than kept."""
    return recomputed_part(config.model, on_gpu=True) == "mlp"


@dataclass(frozen=True)
class LayerActivations:
    """Activations that the backward pass of one layer needs, in bytes per token of a context-parallel rank on one GPU.

    Attributes:
        needed: all of them.
        kept: those that are kept from the forward pass; the others are recomputed.
    """

    needed: float
    kept: float


def layer_activations(config: Config, shape: ModelShape) -> LayerActivations:
    """The activations of one layer under model.recompute.

    They are counted in numbers per token. Of both norms, sharded by sequence parallelism alone: input and output
    (4 H). Of the attention: rotated queries and keys, values, and the output, with a float32 statistic for each head.
    Of the MLP: its first product (2 F) and what it makes of it (F). Rotating is one kernel that keeps nothing.

    In float32 layers are Megatron's own. Also kept are the normalised inputs (2 H), cosines and sines for queries and
    keys (4 d), and of the MLP the activated half and a copy of the other (2 F). Their attention keeps its output twice,
    before and after it is brought into order, and keys and values of all context-parallel ranks; recomputed, instead of
    all that its inputs: the values with the whole product that they are a part of.
    """
    parallel, recompute = config.parallel, config.model.recompute
    size, tp = WEIGHT_BYTES[config.model.dtype], parallel.tp
    hidden = shape.hidden_size / (tp if parallel.sequence_parallel else 1)
    queries = shape.num_attention_heads * shape.head_dim / tp
    keys = shape.num_query_groups * shape.head_dim / tp
    width = shape.ffn_hidden_size / tp
    statistics = 4 * shape.num_attention_heads / tp
    if config.model.dtype == "bfloat16":
        needed = size * (4 * hidden + 2 * queries + 2 * keys + 3 * width) + statistics
        dropped = size * (hidden + 3 * width)  # Transformer Engine's MLP begins with its norm
    else:
        around = 6 * hidden + 4 * shape.head_dim + 5 * width
        attention = size * (3 * queries + 2 * parallel.cp * keys) + statistics
        needed = size * around + attention
        dropped = attention - size * (3 * queries + 3 * keys)
    kept = {"none": needed, "selective": needed - dropped, "full": size * hidden}
    return LayerActivations(needed, kept[recompute])


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
    layer, size = layer_activations(config, shape), WEIGHT_BYTES[config.model.dtype]
    # In one layer's backward: what is recomputed of it, gradients of the MLP's three widest tensors, and at a matrix's
    # edge the input that is gathered over sequence shards with the gradient before it is scattered.
    recomputed = max(layer.needed - layer.kept, 0)
    working = recomputed + size * (3 * shape.ffn_hidden_size / config.parallel.tp + 2 * shape.hidden_size)
    return tokens * (layer.kept * part.num_layers * microbatches_in_flight(config, part.stage) + working)


def _fp8_weights(config: Config, shape: ModelShape, part: StageParameters, gpu: Gpu) -> float:
    """Bytes of the layers' matrices in FP8, cast in each forward pass and saved for the gradient of its input.

    Forward reads a matrix by rows and backward by columns: two copies of one byte, each with its scales, unless the GPU
    reads the one copy of model.fp8=tensorwise both ways. Layers that are recomputed cast anew. Source: Transformer
    Engine 2.20, `quantize_weight` and `wt_save` in pytorch/module/linear.py and layernorm_linear.py;
    `is_non_tn_fp8_gemm_supported` in pytorch/utils.py.
    """
    copies = {
        "none": 0.0,
        "tensorwise": 1.0 if gpu.reads_fp8_both_ways else 2.0,  # one scale a tensor
        "blockwise": 2.0,  # a float32 scale for 128 x 128 numbers
        "mxfp8": 2 * (1 + 1 / 32),  # a byte for 32 numbers
    }[config.model.fp8]
    attention, mlp = (number * copies / config.parallel.tp for number in layer_matrices(shape))
    layers = part.num_layers * microbatches_in_flight(config, part.stage)
    if config.model.recompute == "full":
        return attention + mlp
    if recomputes_mlp(config):
        return attention * layers + mlp
    return (attention + mlp) * layers


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
