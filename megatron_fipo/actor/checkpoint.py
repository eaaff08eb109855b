"""Checkpoints of a run: weights and optimizer in Megatron's torch_dist format, and the loop's own state.

A checkpoint is written under another name and renamed when it is whole; `latest` is moved last. Whenever a run is
killed, `latest` names a whole checkpoint.

    checkpoints/step_000010/    weights, optimizer state and loop state
    checkpoints/latest          the name of the newest

A step that is saved anew, as by a run that is resumed and stopped again before its next step, goes to
step_000010.again, and the next time to step_000010: what `latest` names is never overwritten.
"""

from __future__ import annotations

import queue
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch import nn

from megatron_fipo.actor.actor import Actor
from megatron_fipo.parallel import exchange

_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # one rank, not each, brings the shards together
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


def save_checkpoint(
    actor: Actor, folder: str | Path, step: int, loop_state: Mapping[str, Any], *, keep_last: int
) -> Path:
    """Write a checkpoint and delete the oldest beyond `keep_last`. Collective over all ranks.

    Args:
        folder: the run's checkpoint folder.
        step: steps that are done.
        loop_state: what the loop needs to go on; the same on every rank, picklable.

    Returns:
        The checkpoint's folder.
    """
    root = Path(folder)
    name = f"step_{step:06d}"
    target, replaced = root / name, root / f"{name}.again"
    if _latest_name(root) == name:
        target, replaced = replaced, target
    partial = root / f"{target.name}.partial"
    is_leader = actor.groups.rank == 0
    if is_leader:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    exchange.barrier(actor.groups.world)
    state = _sharded_state(actor, is_loading=False)
    state["loop"] = dict(loop_state)
    _write_without_manager_process()
    dist_checkpointing.save(state, str(partial))
    exchange.barrier(actor.groups.world)
    if is_leader:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        pointer = root / "latest.partial"
        pointer.write_text(target.name + "\n")
        pointer.rename(root / "latest")
        if replaced.exists():
            shutil.rmtree(replaced)
        _delete_old(root, keep_last, target)
    exchange.barrier(actor.groups.world)
    return target


def _write_without_manager_process() -> None:
    """Pass the results of writing on inside this process.

    Megatron has a process started for that which imports all that this program does, 20 s of a first checkpoint that
    may have 30, and which outlives a rank that is killed. Only its asynchronous writers need it.
    """
    filesystem_async._results_queue = queue.Queue()


def _delete_old(root: Path, keep_last: int, newest: Path) -> None:
    whole = sorted(path for path in root.glob("step_*") if path.is_dir() and path.suffix != ".partial")
    for old in whole[: max(len(whole) - keep_last, 0)]:
        if old != newest:
            shutil.rmtree(old)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, None where there is none.

    Raises:
        ValueError: if `latest` names a checkpoint that is not there.
    """
    name = _latest_name(Path(folder))
    if name is None:
        return None
    checkpoint = Path(folder) / name
    if not checkpoint.is_dir():
        raise ValueError(
            f"{Path(folder) / 'latest'} names {name}, which is not there. Write the name of a whole checkpoint into "
            "it, or delete it to start over."
        )
    return checkpoint


def _latest_name(root: Path) -> str | None:
    pointer = root / "latest"
    return pointer.read_text().strip() if pointer.is_file() else None


def load_checkpoint(actor: Actor, checkpoint: str | Path) -> dict[str, Any]:
    """Load weights and optimizer state, in whatever layout they were saved, and return the loop's state.

    Collective over all ranks.
    """
    for optimizer in _single_optimizers(actor.optimizer):
        if hasattr(optimizer, "_set_main_param_and_optimizer_states"):
            _keep_adam_step(optimizer)
    state = _sharded_state(actor, is_loading=True)
    loaded = dist_checkpointing.load(state, str(checkpoint))
    for name, model in _named_models(actor):
        model.load_state_dict(loaded[name])
    actor.optimizer.load_state_dict(loaded["optimizer"])
    for optimizer in _single_optimizers(actor.optimizer):
        _separate_adam_steps(optimizer)
    return loaded["loop"]


def _sharded_state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    metadata = {**_FORMAT, "dp_cp_group": actor.groups.dp_cp}
    for optimizer in _single_optimizers(actor.optimizer):
        _start_adam(optimizer)
        if hasattr(optimizer, "data_parallel_group_gloo"):
            optimizer.data_parallel_group_gloo = optimizer.data_parallel_group  # ours all have gloo for the CPU
    state: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for name, model in _named_models(actor)
    }
    state["optimizer"] = actor.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    if not is_loading and _counts_per_parameter(actor.optimizer):
        # Megatron leaves out a step count of 0, without which torch's Adam could not load what was saved.
        whole = state["optimizer"].get("optimizer", state["optimizer"])
        if "state" in whole:
            whole["state"].setdefault("common_step", torch.tensor(0.0))
    return state


def _named_models(actor: Actor) -> list[tuple[str, nn.Module]]:
    models = actor.models
    return [("model", models[0])] if len(models) == 1 else [(f"model{i}", model) for i, model in enumerate(models)]


def _single_optimizers(optimizer: Any) -> list[Any]:
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _counts_per_parameter(optimizer: Any) -> bool:
    """Whether it is torch's Adam, which counts steps for each parameter; fused ones count in parameter groups."""
    return all(isinstance(single.optimizer, torch.optim.Adam) for single in _single_optimizers(optimizer))


def _start_adam(optimizer: Any) -> None:
    """Make Adam's state where there is none yet.

    It comes into being in the first update, but a run may be saved before that, and loading needs somewhere to load to.
    """
    optimizer.init_state_fn(optimizer.optimizer, optimizer.config)
    if _counts_per_parameter(optimizer):
        for state in optimizer.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _keep_adam_step(optimizer: Any) -> None:
    """torch's Adam keeps its step count as one more tensor per parameter, which Megatron neither saves nor expects.

    Megatron restores the count of the whole group; here each parameter keeps the tensor it has until then.
    """
    set_states = optimizer._set_main_param_and_optimizer_states

    def with_step(model_param: torch.Tensor, tensors: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        group, order = optimizer.model_param_group_index_map[model_param]
        state = optimizer.optimizer.state[optimizer.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        return set_states(model_param, tensors, *args, **kwargs)

    optimizer._set_main_param_and_optimizer_states = with_step


def _separate_adam_steps(optimizer: Any) -> None:
    """Give each parameter a step count of its own.

    Megatron restores one tensor for all of them, and torch's Adam, adding 1 for every parameter, would then count as
    many steps an update as there are parameters.
    """
    for state in optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
