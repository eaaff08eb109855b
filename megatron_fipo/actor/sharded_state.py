"""Weights and optimizer of a model as Megatron saves them: each rank's shards, to be read back in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from megatron_fipo.actor import main_weights, optimizer_shards, optimizer_state
from megatron_fipo.actor.optimizer import single_optimizers
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups

_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

State = dict[str, Any]
"""Megatron's sharded tensors, or what was loaded into their places, by the names of models and optimizer."""


def sharded_state(
    models: Sequence[nn.Module], optimizer: Any, ranks: ParallelGroups, *, is_loading: bool = False
) -> State:
    """This rank's shards of the weights and of the optimizer's state, to be saved or to be loaded into.

    Collective over all ranks.
    """
    metadata = {**_FORMAT, "dp_cp_group": ranks.dp_cp}
    for single in single_optimizers(optimizer):
        optimizer_state.start_adam(single)
    state: State = {
        name: model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for name, model in _by_name(models)
    }
    with optimizer_shards.shared_out(single_optimizers(optimizer)):
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    if not is_loading and optimizer_state.counts_per_parameter(optimizer):
        # Megatron leaves out a step count of 0, without which torch's Adam could not load what was saved.
        whole = state["optimizer"].get("optimizer", state["optimizer"])
        if "state" in whole:
            whole["state"].setdefault("common_step", torch.tensor(0.0))
    return state


def restore_state(
    models: Sequence[nn.Module], optimizer: Any, ranks: ParallelGroups, read: Callable[[State], State]
) -> State:
    """Load weights and optimizer state; see `TrainedModel.restore`.

    Raises:
        OptimizerStateError: on every rank, if what was saved of the optimizer does not belong to the weights.
    """
    settings = optimizer_state.settings(optimizer)
    for single in single_optimizers(optimizer):
        if hasattr(single, "_set_main_param_and_optimizer_states"):
            optimizer_state.keep_adam_step(single)
    loaded = read(sharded_state(models, optimizer, ranks, is_loading=True))
    for name, model in _by_name(models):
        model.load_state_dict(loaded[name])
    shards = main_weights.shards_of_weights(single_optimizers(optimizer))
    with optimizer_shards.shared_out(single_optimizers(optimizer)):
        optimizer.load_state_dict(loaded["optimizer"])
    _check_main_weights(shards, models, ranks)
    for single in single_optimizers(optimizer):
        optimizer_state.separate_adam_steps(single)
    optimizer_state.set_settings(optimizer, settings)
    return loaded


def _check_main_weights(shards: Sequence[Any], models: Sequence[nn.Module], ranks: ParallelGroups) -> None:
    """Check that the optimizer's main weights are those of the model. Collective.

    Raises:
        OptimizerStateError: on every rank, if they are not on one of them.
    """
    foreign = {id(parameter) for parameter in main_weights.foreign_main_weights(shards)}
    own = [name for model in models for name, parameter in model.named_parameters() if id(parameter) in foreign]
    names = sorted({name for part in exchange.all_gather_objects(own, ranks.world) for name in part})
    if names:
        raise main_weights.OptimizerStateError(
            f"the optimizer's main weights differ from the model's weights in {len(names)} parameters, the first of "
            f"them {names[0]}"
        )


def _by_name(models: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """The names that Megatron's own training loop saves model chunks under."""
    return [("model", models[0])] if len(models) == 1 else [(f"model{i}", model) for i, model in enumerate(models)]
