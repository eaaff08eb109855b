"""Optimizer state in checkpoints where Megatron pads between the buckets of a buffer.

The distributed optimizer's state lies in buffers. A buffer has several buckets if gradients are summed during backward,
or if an embedding is shared by two pipeline stages. Each bucket ends with padding, so that it divides among ranks.

To save, Megatron gathers a buffer without the padding. Then it looks for each parameter where it is with padding
(`get_parameter_state_dp_zero` and `sharded_param_state_fully_reshardable` in its distrib_optimizer.py, in 0.16.1 and
0.19.2). Main weights and moments behind a padding would be saved under the name of their neighbour.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


class OptimizerStateError(ValueError):
    """A checkpoint's optimizer state does not belong to its weights."""


@contextmanager
def state_keeps_padding(optimizers: Sequence[Any]) -> Iterator[None]:
    """Inside, distributed optimizers gather their state with the padding; others are left alone."""
    with ExitStack() as undo:
        for optimizer in optimizers:
            if hasattr(optimizer, "get_parameter_state_dp_zero"):
                optimizer.get_parameter_state_dp_zero = _with_padding(optimizer)
                undo.callback(delattr, optimizer, "get_parameter_state_dp_zero")
        yield


def _with_padding(optimizer: Any) -> Any:
    gather = optimizer.get_parameter_state_dp_zero

    def gather_with_padding(*args: Any, **kwargs: Any) -> dict[Any, Any] | None:
        state: dict[Any, Any] | None = gather(*args, **kwargs)
        for index, buffer in enumerate(optimizer.buffers if state is not None else ()):
            for tensors in state[index].values():  # type: ignore[index] # one dtype a buffer
                for name, tensor in tensors.items():
                    if isinstance(tensor, Tensor):  # the rest is the number of elements
                        tensors[name] = _padded(tensor, buffer)
        return state

    return gather_with_padding


def _padded(flat: Tensor, buffer: Any) -> Tensor:
    """The buffer's elements at their places in it.

    Args:
        flat: [numel_unpadded] those of each bucket, one bucket after the other.

    Returns:
        [numel] with zeros between the buckets; the same tensor if the last bucket alone has padding.
    """
    sizes = [bucket.numel_unpadded for bucket in buffer.buckets]
    starts = [bucket.offset for bucket in buffer.buckets]
    if starts == [sum(sizes[:index]) for index in range(len(sizes))]:
        return flat
    padded = flat.new_zeros(buffer.numel)
    for start, part in zip(starts, flat.split(sizes), strict=True):
        padded[start : start + len(part)] = part
    return padded


def shards_of_weights(optimizers: Sequence[Any]) -> list[tuple[Any, Tensor, Tensor]]:
    """Copies of what distributed optimizers keep main weights of: (optimizer, parameter, [shard] its weights)."""
    return [
        (optimizer, parameter, _shard(optimizer, parameter).clone())
        for optimizer in optimizers
        if hasattr(optimizer, "get_parameter_state_dp_zero")
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
