"""Completes how Megatron saves and restores Adam: step counts, settings, and state that does not exist yet.

Transformer Engine's Adam, which Megatron takes wherever it is installed, counts an integer for each parameter group;
torch's counts a floating-point tensor for each parameter, which Megatron saves as a float of the group. A checkpoint of
either can be loaded into the other, on a machine with GPUs or without.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_fipo.actor.optimizer import single_optimizers


def counts_per_parameter(optimizer: Any) -> bool:
    """Whether this is torch's Adam, which counts steps for each parameter; fused ones count in parameter groups."""
    return all(isinstance(single.optimizer, torch.optim.Adam) for single in single_optimizers(optimizer))


_SETTINGS = ("max_lr", "min_lr", "betas", "eps")


def settings(optimizer: Any) -> list[dict[str, Any]]:
    """What the configuration sets in each parameter group; loading overwrites it with the saved run's settings."""
    return [{name: group[name] for name in _SETTINGS if name in group} for group in optimizer.param_groups]


def set_settings(optimizer: Any, noted: list[dict[str, Any]]) -> None:
    """Put back what `settings` returned."""
    for group, values in zip(optimizer.param_groups, noted, strict=True):
        group.update(values)


def start_adam(optimizer: Any) -> None:
    """Make Adam's state where there is none yet.

    Adam makes it in its first update, but a run may be saved before that, and loading needs a place to load into.
    """
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if counts_per_parameter(optimizer):
        for state in optimizer.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
    else:
        for group in optimizer.optimizer.param_groups:
            group.setdefault("step", 0)


def keep_adam_step(optimizer: Any) -> None:
    """Let a parameter keep its step count while Megatron loads its other state.

    torch's Adam has the count as one more tensor for each parameter, which Megatron neither saves nor expects: it
    restores the count of the whole group afterwards.
    """
    set_states = optimizer._set_main_param_and_optimizer_states

    def with_step(model_param: torch.Tensor, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        return set_states(model_param, tensors, *args, **kwargs)

    optimizer._set_main_param_and_optimizer_states = with_step


def separate_adam_steps(optimizer: Any) -> None:
    """After loading, give step counts and the rest of each group the form that this Adam needs, whichever was saved.

    Megatron restores one tensor for all parameters, and torch's Adam, adding 1 for every parameter, would then count as
    many steps an update as there are parameters. A fused Adam hands the count of a group to its kernel, which takes
    nothing but an integer, and reads settings that torch's does not have.
    """
    adam = optimizer.optimizer
    for state in adam.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    if not counts_per_parameter(optimizer):
        for group in adam.param_groups:
            group.update({name: value for name, value in adam.defaults.items() if name not in group})
            group["step"] = int(group.get("step", 0))
