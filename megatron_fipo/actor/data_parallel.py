"""Megatron's data-parallel wrapper around model chunks, which sums their gradients over ranks, also during backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import nn

from megatron_fipo.actor.backend import uses_transformer_engine
from megatron_fipo.actor.hidden_states import unwrap
from megatron_fipo.config import Config
from megatron_fipo.parallel.groups import ParallelGroups

_FUSED = "fuse_wgrad_accumulation"
"""Transformer Engine's linear layers read this attribute in every forward."""


def overlaps_gradients(ranks: ParallelGroups) -> bool:
    """Whether gradients are summed over data-parallel ranks while backward still computes others.

    NCCL does it beside the computation; gloo would take the cores that compute.
    """
    return torch.cuda.is_available() and ranks.dp_cp.size() > 1


def data_parallel_config(config: Config, ranks: ParallelGroups) -> DistributedDataParallelConfig:
    """The wrapper's settings. Gradients are summed in float32.

    Weights are gathered in the optimizer's step and not in the next forward (overlap_param_gather): the wrapper waits
    for a weight where the module that holds it is called, and the output layer's weight is used without its module;
    besides, whoever reads weights after an update (servers, checkpoints, evaluation) would have to gather them first.
    Gathering them at once costs less than a thousandth of a step.
    """
    return DistributedDataParallelConfig(
        use_distributed_optimizer=config.optimizer.distributed,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlaps_gradients(ranks),
    )


def wrap_chunks(chunks: Sequence[nn.Module], config: Config, ranks: ParallelGroups) -> list[nn.Module]:
    """The chunks with buffers for gradients. Wrappers and schedule read the chunks' own TransformerConfig."""
    ddp_config, model_config = data_parallel_config(config, ranks), unwrap(chunks[0]).config
    wrapped = [
        DistributedDataParallel(model_config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    if ddp_config.overlap_grad_reduce:
        # With this the schedule holds the sums back until the last microbatch; without it each microbatch starts them.
        no_sync = [chunk.no_sync for chunk in wrapped]
        model_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    if uses_transformer_engine(config.model):
        fuse_weight_gradients(wrapped)
    return list(wrapped)


def fuse_weight_gradients(chunks: Sequence[nn.Module]) -> None:
    """Let Transformer Engine's products add weight gradients to the float32 buffers, without bfloat16 in between.

    Megatron's own switch for it (gradient_accumulation_fusion) also asks for Apex, for the output layer's sake. The
    chunks must have those buffers.
    """
    for module in (module for chunk in chunks for module in chunk.modules()):
        if hasattr(module, _FUSED):
            setattr(module, _FUSED, True)
