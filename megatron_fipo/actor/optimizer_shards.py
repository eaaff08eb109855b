"""The distributed optimizer's state in checkpoints: written by all data-parallel ranks, read by those that need it.

Each data-parallel rank holds a stretch of every bucket of main weights and moments, whatever parameters lie in it. In a
checkpoint each parameter's state has the parameter's shape, so that it can be read in any layout. Megatron-Core brings
all of it to the first rank to save it, and reads all of it on every rank to load it. At 32B parameters with tensor
parallelism 8 that is 49 GB a rank: 393 GB on the first node, and as much on every node.

Here each parameter has one rank that brings its stretches together and writes it, so that a rank holds its share of the
parameters; and a rank reads the parameters that it holds a stretch of. Names and shapes in the checkpoint are
Megatron-Core's (`sharded_param_state_fully_reshardable` and `load_parameter_state_from_fully_reshardable` in its
distrib_optimizer.py, which these functions take the place of): either can read what the other has written.

Megatron-Core's own function mixes up neighbours where a buffer has padding between its buckets (in 0.16.1 and 0.19.2):
it gathers without the padding, and looks for each parameter where it is with padding. Here a stretch has the place in
its parameter that the optimizer itself gives it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

from megatron_fipo.parallel import exchange

_KEYS = ("param", "exp_avg", "exp_avg_sq")
_NAME = "optimizer.state"
_AT_ONCE = 2**27
"""Elements that all ranks exchange at a time: half a GiB, of which each sends and receives its share."""


@dataclass(frozen=True)
class _Stretch:
    """The part [start, end) of a parameter's elements whose state a data-parallel rank holds."""

    rank: int
    start: int
    end: int


@dataclass(frozen=True)
class _Parameter:
    """A parameter and where its state is.

    Attributes:
        number: its place among all parameters of the optimizer, as Megatron-Core counts them.
        stretches: by rank; they cover the parameter.
    """

    number: int
    tensor: Tensor
    stretches: tuple[_Stretch, ...]

    def held_by(self, rank: int) -> _Stretch | None:
        """The rank's stretch, if it has one."""
        return next((stretch for stretch in self.stretches if stretch.rank == rank), None)


def _parameters(optimizer: Any) -> list[_Parameter]:
    """All parameters of a distributed optimizer, the same on every rank of its data-parallel group."""
    found: list[_Parameter] = []
    for buffer in optimizer.buffers:
        for tensor, (start, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            size = bucket.grad_data.numel() // buffer.data_parallel_group.size()
            first, last = (start - bucket.offset) // size, (end - 1 - bucket.offset) // size
            borders = [bucket.offset + rank * size for rank in range(first, last + 2)]
            stretches = tuple(
                _Stretch(rank, max(start, borders[i]) - start, min(end, borders[i + 1]) - start)
                for i, rank in enumerate(range(first, last + 1))
            )
            found.append(_Parameter(len(found), tensor, stretches))
    return found


def _writers(parameters: Sequence[_Parameter], num_ranks: int) -> dict[int, int]:
    """Which rank writes each parameter, by number: the largest first, each to the rank that has least."""
    loads = [(0, rank) for rank in range(num_ranks)]
    writers = {}
    for parameter in sorted(parameters, key=lambda parameter: (-parameter.tensor.numel(), parameter.number)):
        load, rank = heapq.heappop(loads)
        writers[parameter.number] = rank
        heapq.heappush(loads, (load + parameter.tensor.numel(), rank))
    return writers


@contextmanager
def shared_out(optimizers: Sequence[Any]) -> Iterator[None]:
    """Inside, distributed optimizers save and load their state by these functions; others are left alone."""
    with ExitStack() as undo:
        for optimizer in optimizers:
            if is_distributed(optimizer):
                optimizer.sharded_param_state_fully_reshardable = partial(_sharded_state, optimizer)
                optimizer.load_parameter_state_from_fully_reshardable = partial(_load_state, optimizer)
                undo.callback(delattr, optimizer, "sharded_param_state_fully_reshardable")
                undo.callback(delattr, optimizer, "load_parameter_state_from_fully_reshardable")
        yield


def is_distributed(optimizer: Any) -> bool:
    """Whether this is Megatron's distributed optimizer."""
    return hasattr(optimizer, "sharded_param_state_fully_reshardable")


def _sharded_state(
    optimizer: Any, model_state: Any, is_loading: bool = False, metadata: Mapping[str, Any] | None = None
) -> dict[int, dict[str, Any]]:
    """Sharded tensors that this rank writes, or that it loads into; by parameter's number and key.

    Collective over the data-parallel group to save; to load, without communication.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    of_model = {id(found.data): found for found in nested_values(sharded)}
    rank = optimizer.data_parallel_group.rank()
    parameters = _parameters(optimizer)
    if is_loading:
        return {
            parameter.number: {
                key: _placed(
                    of_model[id(parameter.tensor)], key, torch.empty(parameter.tensor.shape), holders.index(rank)
                )
                for key in _KEYS
            }
            for parameter in parameters
            for holders in [[stretch.rank for stretch in parameter.stretches]]
            if rank in holders
        }
    # What every tensor-parallel rank has, or a second pipeline stage, is written by the first one's group.
    written = [p for p in parameters if not any(_other_replicas(of_model[id(p.tensor)]))]
    whole = _brought_together(optimizer, written)
    return {
        parameter.number: {
            key: _placed(of_model[id(parameter.tensor)], key, whole[parameter.number][key], 0) for key in _KEYS
        }
        for parameter in written
        if parameter.number in whole
    }


def _other_replicas(of_model: Any) -> tuple[int, ...]:
    """The replica's number in all but data parallelism, which is the last."""
    replica = of_model.replica_id
    return tuple(replica[:-1]) if isinstance(replica, tuple) else ()


def _placed(of_model: Any, key: str, values: Tensor, replica: int) -> Any:
    """A parameter's state as a sharded tensor with the parameter's own place in the model.

    Args:
        replica: the rank's number among those of its data-parallel group that have this tensor.
    """
    changes: dict[str, Any] = {
        "key": f"{_NAME}.{key}.{of_model.key}",
        "data": values.view(of_model.data.shape),
        "replica_id": (*_other_replicas(of_model), replica),
    }
    if not isinstance(of_model, ShardedTensorFactory):
        changes["dtype"] = values.dtype
    return replace(of_model, **changes)


def _brought_together(optimizer: Any, parameters: Sequence[_Parameter]) -> dict[int, dict[str, Tensor]]:
    """The whole state, float32 on the CPU, of the parameters that this rank writes, by number. Collective."""
    group = optimizer.data_parallel_group
    writers = _writers(parameters, group.size())
    whole: dict[int, dict[str, Tensor]] = {
        p.number: {key: torch.empty(p.tensor.numel()) for key in _KEYS}
        for p in parameters
        if writers[p.number] == group.rank()
    }
    for batch in _batches(parameters):
        for key in _KEYS:
            received = _exchanged(optimizer, batch, writers, key)
            for source in range(group.size()):
                for parameter in batch:
                    stretch = parameter.held_by(source)
                    if parameter.number in whole and stretch is not None:
                        place, received = (
                            received[: stretch.end - stretch.start],
                            received[stretch.end - stretch.start :],
                        )
                        whole[parameter.number][key][stretch.start : stretch.end] = place
    return whole


def _batches(parameters: Sequence[_Parameter]) -> Iterator[list[_Parameter]]:
    """Parameters in order, in batches of `_AT_ONCE` elements or of one parameter."""
    batch: list[_Parameter] = []
    for parameter in parameters:
        if batch and sum(p.tensor.numel() for p in (*batch, parameter)) > _AT_ONCE:
            yield batch
            batch = []
        batch.append(parameter)
    if batch:
        yield batch


def _exchanged(optimizer: Any, batch: Sequence[_Parameter], writers: Mapping[int, int], key: str) -> Tensor:
    """What this rank receives of the batch's parameters that it writes: by source, then by parameter. Collective."""
    group = optimizer.data_parallel_group
    own, ranks = group.rank(), range(group.size())
    parts: list[Tensor] = []
    to_send, to_receive = [0] * len(ranks), [0] * len(ranks)
    for target in ranks:
        for parameter in batch:
            stretch = parameter.held_by(own)
            if writers[parameter.number] == target and stretch is not None:
                values = optimizer._get_main_param_and_optimizer_states(parameter.tensor)[key]
                parts.append(values.detach().view(-1).float().cpu())
                to_send[target] += stretch.end - stretch.start
    for source in ranks:
        held = (parameter.held_by(source) for parameter in batch if writers[parameter.number] == own)
        to_receive[source] = sum(stretch.end - stretch.start for stretch in held if stretch is not None)
    sent = torch.cat(parts) if parts else torch.empty(0)
    return exchange.all_to_all_parts(sent, to_send, to_receive, group)


@torch.no_grad()
def _load_state(optimizer: Any, loaded: Mapping[int, Mapping[str, Tensor]]) -> None:
    """Take this rank's stretches out of what was loaded into `_sharded_state`. No communication."""
    rank = optimizer.data_parallel_group.rank()
    for parameter in _parameters(optimizer):
        stretch = parameter.held_by(rank)
        if stretch is not None:
            values = loaded[parameter.number]
            optimizer._set_main_param_and_optimizer_states(
                parameter.tensor, {key: values[key].flatten()[stretch.start : stretch.end] for key in _KEYS}
            )
