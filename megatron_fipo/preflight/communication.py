"""Time that a GPU's layers wait for other GPUs: what tensor and context parallelism exchange and nothing hides.

Data-parallel sums of gradients run beside the backward pass, and pipeline stages hand over little: they are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.preflight.hardware import Gpu
from megatron_fipo.preflight.memory import WEIGHT_BYTES, recomputes_mlp


@dataclass(frozen=True)
class Links:
    """Bandwidths that exchanges reach, in bytes per second of each GPU and direction.

    Attributes:
        node: bandwidth to GPUs of the same node.
        ring: bandwidth to the neighbour in a context-parallel group.
        attention_flops: operations per second of the attention, beside which the ring's exchange runs.
    """

    node: float
    ring: float
    attention_flops: float


def links_of(
    config: Config, gpu: Gpu, gpus_per_node: int, link_efficiency: float, network: float, efficiency: float
) -> Links:
    """A tensor-parallel group lies within a node, and a context-parallel one does if both together fit."""
    node = gpu.link_bandwidth * link_efficiency
    is_inside = config.parallel.tp * config.parallel.cp <= gpus_per_node
    return Links(node, node if is_inside else network, gpu.peak_flops * efficiency)


@dataclass(frozen=True)
class Waits:
    """Seconds per token of a context-parallel rank and layer.

    Attributes:
        forward, backward: in the forward and in the backward pass.
        recompute: in what the backward pass computes anew.
    """

    forward: float
    backward: float
    recompute: float


def layer_waits(config: Config, shape: ModelShape, links: Links, length: float) -> Waits:
    """Return the bytes that one layer exchanges in sequences of `length` tokens.

    Tensor parallelism gathers the input of two pairs of matrices and scatters the sum of their outputs (or sums them,
    which moves the same): four exchanges of (tp - 1) / tp of the hidden states. Backward has as many; it also gathers
    the inputs for the weights' gradients, beside the product for the input's gradient. Keys and values go around the
    context-parallel ring beside the attention of those that are there: what takes longer than that attention is waited
    for. Backward sends their gradients along, with twice the attention.
    """
    parallel, size = config.parallel, WEIGHT_BYTES[config.model.dtype]
    exchanges = 4 * (parallel.tp - 1) / parallel.tp * size * shape.hidden_size / links.node
    groups = max(shape.num_query_groups / parallel.tp, 1)
    sent = (parallel.cp - 1) * 2 * groups * shape.head_dim * size / links.ring
    attention = 2 * shape.num_attention_heads * shape.head_dim * length / parallel.tp / links.attention_flops
    ring = max(sent - attention * (parallel.cp - 1) / parallel.cp, 0.0)
    recompute = 0.0
    if config.model.recompute == "full":
        recompute = exchanges + ring
    elif recomputes_mlp(config):
        recompute = exchanges / 2
    elif config.model.recompute == "selective":
        recompute = ring
    return Waits(exchanges + ring, exchanges + 2 * ring, recompute)
