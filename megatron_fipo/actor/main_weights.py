"""Compares the optimizer's main weights with the model's: what was loaded of the one must belong to the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.actor.optimizer_shards import is_distributed


class OptimizerStateError(ValueError):
    """A checkpoint's optimizer state does not belong to its weights."""


def shards_of_weights(optimizers: Sequence[Any]) -> list[tuple[Any, Tensor, Tensor]]:
    """Copies of what distributed optimizers keep main weights of: (optimizer, parameter, [shard] its weights)."""
    return [
        (optimizer, parameter, _shard(optimizer, parameter).clone())
        for optimizer in optimizers
        if is_distributed(optimizer)
        for parameter in optimizer.model_param_group_index_map
    ]


def _shard(optimizer: Any, parameter: Tensor) -> Tensor:
    shard = optimizer._get_model_param_range_map(parameter)["param"]
    return parameter.detach().view(-1)[shard.start : shard.end]


def foreign_main_weights(shards: Sequence[tuple[Any, Tensor, Tensor]]) -> list[Tensor]:
    """Parameters whose main weights, rounded to the model's type, are not the weights of `shards_of_weights`."""
    found = []
    for optimizer, parameter, weights in shards:
        main = optimizer._get_main_param_and_optimizer_states(parameter)["param"].detach()
        if not torch.equal(main.to(weights.dtype), weights):
            found.append(parameter)
    return found
