"""Checkpoints of a run: weights and optimizer in Megatron's torch_dist format, and the loop's own state.

They are read back in any layout. See `checkpoint_folder` for how they lie on disk.
"""

from __future__ import annotations

import inspect
import multiprocessing
import queue
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from megatron_fipo.actor import optimizer_state
from megatron_fipo.actor.actor import Actor
from megatron_fipo.checkpoint import folder as checkpoint_folder
from megatron_fipo.checkpoint.error import CheckpointError as CheckpointError
from megatron_fipo.checkpoint.error import could_not_read, could_not_write
from megatron_fipo.checkpoint.forked_writers import ended_with_their_parent
from megatron_fipo.convert.checkpoint_pickles import check_pickles
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups

_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,  # one rank, not each, brings the shards together
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}

# From 0.19 on Megatron-Core can write through a package of NVIDIA's, and would unless told otherwise.
_MEGATRONS_OWN_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay.

    Attributes:
        last: the newest so many.
        every: and those after every so many steps, for good; 0 keeps none of them.
    """

    last: int = 2
    every: int = 0


def save_checkpoint(
    actor: Actor,
    folder: str | Path,
    step: int,
    loop_state: Mapping[str, Any],
    keeping: Keeping,
    *,
    num_updates: int = 0,
    extras: Callable[[Path], None] | None = None,
) -> Path:
    """Write a checkpoint and delete those that `keeping` does not name. Collective over all ranks.

    Args:
        folder: the run's checkpoint folder.
        step: steps that are done.
        loop_state: what the loop needs to go on; the same on every rank, picklable.
        num_updates: updates of the next step that are done too.
        extras: called on every rank to write more into the checkpoint's folder.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: if something could not be written; what was written of it is left behind as .partial and
            cleared away by the next save.
    """
    writing = begin_checkpoint(
        actor, folder, step, loop_state, keeping, num_updates=num_updates, extras=extras, asynchronous=False
    )
    return writing.finish()


def begin_checkpoint(
    actor: Actor,
    folder: str | Path,
    step: int,
    loop_state: Mapping[str, Any],
    keeping: Keeping,
    *,
    num_updates: int = 0,
    extras: Callable[[Path], None] | None = None,
    asynchronous: bool = True,
) -> PendingCheckpoint:
    """Take a snapshot and write it in a process beside this one; training may go on. See `save_checkpoint`.

    Megatron-Core forks the writer: tensors on a GPU are copied to the host first, those of a CPU are the fork's own.
    """
    partial, target = _begin(Path(folder), checkpoint_folder.checkpoint_name(step, num_updates), actor.groups)
    pending = PendingCheckpoint(actor.groups, partial, target, keeping, AsyncCallsQueue())
    state = _sharded_state(actor, is_loading=False)
    state["loop"] = dict(loop_state)
    _set_results_queue(asynchronous)
    try:
        with ended_with_their_parent():
            request = dist_checkpointing.save(
                state, str(partial), async_sharded_save=asynchronous, **_MEGATRONS_OWN_WRITER
            )
        if extras is not None:
            extras(partial)
        if asynchronous:
            with ended_with_their_parent():
                pending.queue.schedule_async_request(request)
    except (OSError, CheckpointException, RuntimeError) as error:
        raise could_not_write(target, error) from error
    return pending


def _begin(root: Path, name: str, groups: ParallelGroups) -> tuple[Path, Path]:
    """The folder to write into and what it becomes, the same on every rank. Collective."""
    answer: tuple[Path, Path] | OSError | None = None
    if groups.rank == 0:
        try:
            answer = checkpoint_folder.begin(root, name)
        except OSError as error:
            answer = error
    answer = exchange.all_gather_objects(answer, groups.world)[0]
    if isinstance(answer, OSError):
        raise could_not_write(root / name, answer) from answer
    assert answer is not None
    return answer


@dataclass
class PendingCheckpoint:
    """A checkpoint that is being written. Its methods are collective over all ranks."""

    groups: ParallelGroups
    partial: Path
    target: Path
    keeping: Keeping
    queue: AsyncCallsQueue

    def poll(self) -> bool:
        """Whether every rank has written its part; the checkpoint takes its place then.

        Raises:
            CheckpointError: if a rank could not.
        """
        if not self._finalize(blocking=False):
            return False
        self._publish()
        return True

    def finish(self) -> Path:
        """Wait until it is written and has taken its place; its folder.

        Raises:
            CheckpointError: if a rank could not write.
        """
        self._finalize(blocking=True)
        self._publish()
        return self.target

    def _finalize(self, blocking: bool) -> bool:
        if not self.queue.get_num_unfinalized_calls():
            return True
        try:
            return bool(self.queue.maybe_finalize_async_calls(blocking=blocking))
        except (OSError, CheckpointException, RuntimeError) as error:
            raise could_not_write(self.target, error) from error

    def _publish(self) -> None:
        try:
            exchange.barrier(self.groups.world)
            names = exchange.all_gather_objects(checkpoint_folder.file_names(self.partial), self.groups.world)[0]
            own = names[self.groups.rank :: self.groups.world.size()]
            described = self._together(lambda: checkpoint_folder.describe_files(self.partial, own))
            self._together(lambda: self._take_its_place({k: v for part in described for k, v in part.items()}))
        except (OSError, RuntimeError) as error:
            raise could_not_write(self.target, error) from error

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """What every rank's action gives; the first OSError of any is raised on all, so that none waits for it."""
        outcome: Any
        try:
            outcome = action()
        except OSError as error:
            outcome = error
        outcomes = exchange.all_gather_objects(outcome, self.groups.world)
        for outcome in outcomes:
            if isinstance(outcome, OSError):
                raise outcome
        return outcomes

    def _take_its_place(self, files: Mapping[str, Mapping[str, int]]) -> None:
        if self.groups.rank == 0:
            checkpoint_folder.write_manifest(self.partial, files)
            checkpoint_folder.publish(self.partial, self.target)
            checkpoint_folder.delete_old(self.target.parent, self.keeping.last, self.keeping.every)


def _set_results_queue(asynchronous: bool) -> None:
    """Where Megatron's writers leave their results.

    Megatron has a manager process started for that which imports all that this program does, 20 s of a first
    checkpoint that may have 30, and which outlives a rank that is killed. Writing in this process needs no more than a
    queue in it, a forked writer a pipe.
    """
    made: Any = multiprocessing.get_context("fork").Queue() if asynchronous else queue.Queue()
    filesystem_async._results_queue = made


def find_whole_checkpoint(folder: str | Path, groups: ParallelGroups, on_fault: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run with every byte as it was written, None where there never was one.

    Collective over all ranks: each reads and checks a share of the files.

    Args:
        on_fault: called on every rank with a line about each checkpoint that is passed over.

    Raises:
        ValueError: if there are checkpoints, and none is whole.
    """
    root = Path(folder)
    candidates = exchange.all_gather_objects(checkpoint_folder.by_trust(root), groups.world)[0]
    for candidate in candidates:
        found = _faults(candidate, groups)
        if not found:
            return candidate
        on_fault(f"{candidate} is damaged and is passed over: {'; '.join(found[:3])}")
    name = exchange.all_gather_objects(checkpoint_folder.latest_name(root), groups.world)[0]
    if candidates or name is not None:
        raise ValueError(
            f"no checkpoint in {root} is whole{f', and its file latest names {name}' if name else ''}. Restore one "
            "from a copy, set train.resume=false to start over (the old run is renamed), or delete the folder to train "
            "anew on the recorded rollouts."
        )
    return None


def _faults(candidate: Path, groups: ParallelGroups) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank. Collective."""
    try:
        files = checkpoint_folder.read_manifest(candidate)
        own = checkpoint_folder.faults(candidate, sorted(files)[groups.rank :: groups.world.size()], files)
    except (ValueError, OSError) as error:
        own = [str(error)]
    return list(dict.fromkeys(fault for part in exchange.all_gather_objects(own, groups.world) for fault in part))


def load_loop_state(checkpoint: str | Path) -> dict[str, Any]:
    """The loop's state alone. No communication.

    Raises:
        UntrustedCheckpointError: if opening the checkpoint would run code.
        ValueError: if it is none of a run's.
    """
    check_pickles(checkpoint)
    try:
        with _without_advice():
            common = dist_checkpointing.load_common_state_dict(Path(checkpoint))
    except CheckpointingException as error:
        raise could_not_read(Path(checkpoint), error) from error
    state = common.get("loop") if isinstance(common, dict) else None
    if not isinstance(state, dict) or type(state.get("next_step")) is not int:
        raise ValueError(
            f"{checkpoint} holds weights but not the state of a run, so that none can go on from it. Restore it from "
            "a copy, "
            "or set train.resume=false to start over (the old run is renamed)."
        )
    return state


def load_checkpoint(actor: Actor, checkpoint: str | Path) -> dict[str, Any]:
    """Load weights and optimizer state, in whatever layout they were saved, and return the loop's state.

    Learning rate and Adam's constants stay those of the actor's configuration. Collective over all ranks.

    Raises:
        UntrustedCheckpointError: on every rank, if opening the checkpoint would run code.
        ValueError: on every rank, if its files do not hold what it says.
    """
    check_pickles(checkpoint)
    settings = optimizer_state.settings(actor.optimizer)
    for optimizer in optimizer_state.single_optimizers(actor.optimizer):
        if hasattr(optimizer, "_set_main_param_and_optimizer_states"):
            optimizer_state.keep_adam_step(optimizer)
    state = _sharded_state(actor, is_loading=True)
    try:
        with _without_advice():
            loaded = dist_checkpointing.load(state, str(checkpoint))
    except (CheckpointException, CheckpointingException) as error:
        raise could_not_read(Path(checkpoint), error) from error
    for name, model in _named_models(actor):
        model.load_state_dict(loaded[name])
    actor.optimizer.load_state_dict(loaded["optimizer"])
    for optimizer in optimizer_state.single_optimizers(actor.optimizer):
        optimizer_state.separate_adam_steps(optimizer)
    optimizer_state.set_settings(actor.optimizer, settings)
    loop_state = loaded["loop"]
    assert isinstance(loop_state, dict)
    return loop_state


@contextmanager
def _without_advice() -> Iterator[None]:
    """Without what torch advises Megatron-Core to do otherwise when it loads: no user of this one can act on it.

    0.16 calls torch's load_state_dict and asks ShardedTensors for their size, both of which torch is to drop; 0.19
    calls load with its arguments in another order, and reads the common state on one rank alone, which torch points
    out.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")
        for message in ("torch.distributed is disabled, unavailable or uninit", "The argument order of load has been"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def _sharded_state(actor: Actor, *, is_loading: bool) -> dict[str, Any]:
    metadata = {**_FORMAT, "dp_cp_group": actor.groups.dp_cp}
    for optimizer in optimizer_state.single_optimizers(actor.optimizer):
        optimizer_state.start_adam(optimizer)
        if hasattr(optimizer, "data_parallel_group_gloo"):
            optimizer.data_parallel_group_gloo = optimizer.data_parallel_group  # ours all have gloo for the CPU
    state: dict[str, Any] = {
        name: model.sharded_state_dict(metadata=metadata)  # type: ignore[operator]
        for name, model in _named_models(actor)
    }
    state["optimizer"] = actor.optimizer.sharded_state_dict(dict(state), is_loading=is_loading, metadata=metadata)
    if not is_loading and optimizer_state.counts_per_parameter(actor.optimizer):
        # Megatron leaves out a step count of 0, without which torch's Adam could not load what was saved.
        whole = state["optimizer"].get("optimizer", state["optimizer"])
        if "state" in whole:
            whole["state"].setdefault("common_step", torch.tensor(0.0))
    return state


def _named_models(actor: Actor) -> list[tuple[str, nn.Module]]:
    models = actor.models
    return [("model", models[0])] if len(models) == 1 else [(f"model{i}", model) for i, model in enumerate(models)]
