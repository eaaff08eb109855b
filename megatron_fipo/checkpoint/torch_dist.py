"""Checkpoints of a run: weights and optimizer in Megatron's torch_dist format, and the loop's own state.

They are read back in any layout. `checkpoint.folder` says how they lie on disk.
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

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from torch.distributed.checkpoint import CheckpointException

from megatron_fipo.actor.main_weights import OptimizerStateError
from megatron_fipo.actor.trained import TrainedModel
from megatron_fipo.checkpoint import folder as checkpoint_folder
from megatron_fipo.checkpoint.error import CheckpointError as CheckpointError
from megatron_fipo.checkpoint.error import could_not_read, could_not_write
from megatron_fipo.checkpoint.forked_writers import ended_with_their_parent
from megatron_fipo.convert.checkpoint_pickles import check_pickles
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups

# From 0.19 on Megatron-Core can write through a package of NVIDIA's, and would unless told otherwise.
_MEGATRONS_OWN_WRITER: dict[str, Any] = (
    {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}
)


@dataclass(frozen=True)
class Keeping:
    """Which checkpoints stay.

    Attributes:
        last: this many of the newest stay.
        every: those whose number of steps is a multiple of this stay for good, too; 0 keeps none for good.
    """

    last: int = 2
    every: int = 0


def begin_checkpoint(
    model: TrainedModel[Any],
    folder: str | Path,
    step: int,
    loop_state: Mapping[str, Any],
    keeping: Keeping,
    *,
    num_updates: int = 0,
    extras: Callable[[Path], None] | None = None,
    asynchronous: bool = True,
) -> PendingCheckpoint:
    """Take a snapshot and write it; `PendingCheckpoint.finish` makes it a checkpoint. Collective over all ranks.

    Args:
        folder: the run's checkpoint folder.
        step: steps that are done.
        loop_state: what the loop needs to continue; the same on every rank, picklable.
        keeping: which checkpoints stay once this one is whole.
        num_updates: updates of the next step that are done too.
        extras: called on every rank to write more into the checkpoint's folder.
        asynchronous: write in a process beside this one, while training goes on. Megatron-Core forks it: tensors on a
            GPU are copied to the host first, and the fork itself copies those on a CPU.

    Raises:
        CheckpointError: if something could not be written. What was written is left behind as .partial, and the next
            save clears it away.
    """
    partial, target = _begin(Path(folder), checkpoint_folder.checkpoint_name(step, num_updates), model.ranks)
    pending = PendingCheckpoint(model.ranks, partial, target, keeping, AsyncCallsQueue())
    state = model.sharded_state()
    state["loop"] = dict(loop_state)
    _set_results_queue(asynchronous)
    try:
        with ended_with_their_parent():
            request = dist_checkpointing.save(
                state,
                str(partial),
                # What several data-parallel ranks have alike, each writes a share of.
                sharded_strategy=FullyParallelSaveStrategyWrapper(
                    get_default_save_sharded_strategy(), model.ranks.dp_cp
                ),
                async_sharded_save=asynchronous,
                **_MEGATRONS_OWN_WRITER,
            )
        if extras is not None:
            extras(partial)
        if asynchronous:
            with ended_with_their_parent():
                pending.queue.schedule_async_request(request)
    except (OSError, CheckpointException, RuntimeError) as error:
        raise could_not_write(target, error) from error
    return pending


def _begin(root: Path, name: str, ranks: ParallelGroups) -> tuple[Path, Path]:
    """The folder to write into and the one that it becomes, the same on every rank. Collective."""
    answer: tuple[Path, Path] | OSError | None = None
    if ranks.rank == 0:
        try:
            answer = checkpoint_folder.begin(root, name)
        except OSError as error:
            answer = error
    answer = exchange.all_gather_objects(answer, ranks.world)[0]
    if isinstance(answer, OSError):
        raise could_not_write(root / name, answer) from answer
    assert answer is not None
    return answer


@dataclass
class PendingCheckpoint:
    """A checkpoint that is being written. Its methods are collective over all ranks."""

    ranks: ParallelGroups
    partial: Path
    target: Path
    keeping: Keeping
    queue: AsyncCallsQueue

    def poll(self) -> bool:
        """Whether every rank has written its part. If so, the checkpoint has its name when this returns.

        Raises:
            CheckpointError: if a rank could not.
        """
        if not self._finalize(blocking=False):
            return False
        self._publish()
        return True

    def finish(self) -> Path:
        """Wait until it is written and has its name; returns its folder.

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
            exchange.barrier(self.ranks.world)
            names = exchange.all_gather_objects(checkpoint_folder.file_names(self.partial), self.ranks.world)[0]
            own = names[self.ranks.rank :: self.ranks.world.size()]
            described = self._together(lambda: checkpoint_folder.describe_files(self.partial, own))
            self._together(lambda: self._take_its_place({k: v for part in described for k, v in part.items()}))
        except (OSError, RuntimeError) as error:
            raise could_not_write(self.target, error) from error

    def _together(self, action: Callable[[], Any]) -> list[Any]:
        """What each rank's action returns. An OSError of any rank is raised on all, so that no rank waits for it."""
        outcome: Any
        try:
            outcome = action()
        except OSError as error:
            outcome = error
        outcomes = exchange.all_gather_objects(outcome, self.ranks.world)
        for outcome in outcomes:
            if isinstance(outcome, OSError):
                raise outcome
        return outcomes

    def _take_its_place(self, files: Mapping[str, Mapping[str, int]]) -> None:
        if self.ranks.rank == 0:
            checkpoint_folder.write_manifest(self.partial, files)
            checkpoint_folder.publish(self.partial, self.target)
            checkpoint_folder.delete_old(self.target.parent, self.keeping.last, self.keeping.every)


def _set_results_queue(asynchronous: bool) -> None:
    """Give Megatron's writers a place to leave their results.

    Megatron would start a manager process for it. That process imports all that this program does, which takes 20 s of
    a first checkpoint that may have 30, and it outlives a rank that is killed. A writer in this process needs no more
    than a queue in it, and a forked writer no more than a pipe.
    """
    made: Any = multiprocessing.get_context("fork").Queue() if asynchronous else queue.Queue()
    filesystem_async._results_queue = made


def find_whole_checkpoint(folder: str | Path, ranks: ParallelGroups, on_fault: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run whose every byte is as it was written; None where there never was one.

    Collective over all ranks: each reads and checks a share of the files.

    Args:
        on_fault: called on every rank with a line about each checkpoint that is passed over.

    Raises:
        ValueError: if there are checkpoints, and none is whole.
    """
    root = Path(folder)
    candidates = exchange.all_gather_objects(checkpoint_folder.latest_first(root), ranks.world)[0]
    for candidate in candidates:
        found = _faults(candidate, ranks)
        if not found:
            return candidate
        on_fault(f"{candidate} is damaged and is passed over: {'; '.join(found[:3])}")
    name = exchange.all_gather_objects(checkpoint_folder.latest_name(root), ranks.world)[0]
    if candidates or name is not None:
        raise ValueError(
            f"no checkpoint in {root} is whole{f', and its file latest names {name}' if name else ''}. Restore one "
            "from a copy, set train.resume=false to start over (the old run is renamed), or delete the folder to train "
            "anew on the recorded rollouts."
        )
    return None


def _faults(candidate: Path, ranks: ParallelGroups) -> list[str]:
    """What is wrong with a checkpoint, the same on every rank. Collective."""
    try:
        files = checkpoint_folder.read_manifest(candidate)
        own = checkpoint_folder.faults(candidate, sorted(files)[ranks.rank :: ranks.world.size()], files)
    except (ValueError, OSError) as error:
        own = [str(error)]
    return list(dict.fromkeys(fault for part in exchange.all_gather_objects(own, ranks.world) for fault in part))


def load_loop_state(checkpoint: str | Path) -> dict[str, Any]:
    """The loop's state, without weights and optimizer. No communication.

    Raises:
        UntrustedCheckpointError: if opening the checkpoint would run code.
        ValueError: if it holds no state of a run's loop.
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
            f"{checkpoint} holds weights but not the state of a run, so that no run can go on from it. Restore it from "
            "a copy, or set train.resume=false to start over (the old run is renamed)."
        )
    return state


def load_checkpoint(model: TrainedModel[Any], checkpoint: str | Path) -> dict[str, Any]:
    """Load weights and optimizer state, in whatever layout they were saved, and return the loop's state.

    Learning rate and Adam's constants stay those of the model's configuration. Collective over all ranks.

    Raises:
        UntrustedCheckpointError: on every rank, if opening the checkpoint would run code.
        ValueError: on every rank, if its files do not hold what it says.
    """
    check_pickles(checkpoint)

    def read(state: dict[str, Any]) -> dict[str, Any]:
        try:
            with _without_advice():
                return dist_checkpointing.load(state, str(checkpoint))
        except (CheckpointException, CheckpointingException) as error:
            raise could_not_read(Path(checkpoint), error) from error

    try:
        loop_state = model.restore(read)["loop"]
    except OptimizerStateError as error:
        raise ValueError(
            f"no run can go on from {checkpoint}: {error}. Development versions before 0.1.0 wrote such checkpoints "
            "where pipeline stages share an embedding, or several GPUs summed gradients during backward. The model's "
            "weights in it are right. Make a model of them with 'megatron-fipo convert megatron-to-hf', and start a "
            "new run from it."
        ) from error
    assert isinstance(loop_state, dict)
    return loop_state


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silence torch's advice on how Megatron-Core loads: nobody who runs this program can act on it.

    Megatron-Core 0.16 calls torch's load_state_dict and asks ShardedTensors for their size, both of which torch is to
    drop. 0.19 calls load with its arguments in another order, and reads the common state on one rank alone; torch warns
    of both.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|megatron)\.")
        for message in ("torch.distributed is disabled, unavailable or uninit", "The argument order of load has been"):
            warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield
