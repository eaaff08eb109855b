"""Checkpoints that are written while training goes on: each holds its own step's state, and nothing later or earlier.

A trainer whose background writer handed the first state over again wrote the same weights under the names of several
steps. So all weights and the optimizer's state are compared, bit for bit, with those of the same training that waits
for each of its checkpoints, and with those of its other steps.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest, TemporalAsyncCaller
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_fipo.actor.actor import Actor
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint
from tests.checkpoints import contents, differing
from tests.parallel import layouts
from tests.parallel.layouts import Case, Outcome, config_of, layout, train_step
from tests.parallel.ranks import run_ranks

NAMES = [f"step_{step:06d}" for step in (1, 2, 3)]
PATIENCE_S = 120.0
Saved = dict[str, dict[str, torch.Tensor]]
"""What a training's checkpoints hold, by their names."""


# --- on ranks --------------------------------------------------------------------------------------------------------


class Writing:
    """How checkpoints are written in the background."""

    def __init__(self) -> None:
        self._schedule = TemporalAsyncCaller.schedule_async_call

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """They are written in this way meanwhile."""
        schedule = self.schedule
        with mock.patch.object(
            TemporalAsyncCaller, "schedule_async_call", lambda caller, request: schedule(caller, request)
        ):
            yield

    def schedule(self, caller: TemporalAsyncCaller, request: AsyncRequest) -> None:
        """Take the place of `schedule_async_call`."""
        raise NotImplementedError

    def trained(self) -> None:
        """The step after the checkpoint has been trained."""
        raise NotImplementedError


class WrittenLate(Writing):
    """A slow disk: the forked writer begins when the next step is trained."""

    def __init__(self) -> None:
        super().__init__()
        self._is_trained = multiprocessing.get_context("fork").Event()

    def schedule(self, caller: TemporalAsyncCaller, request: AsyncRequest) -> None:
        self._is_trained.clear()
        self._schedule(caller, request._replace(async_fn=partial(self._write, request.async_fn)))

    def trained(self) -> None:
        self._is_trained.set()

    def _write(self, write_now: Callable[..., None], *arguments: Any) -> None:
        assert self._is_trained.wait(PATIENCE_S), "no step was trained meanwhile"
        write_now(*arguments)


class TakenLate(Writing):
    """A mistake: what is handed over is no copy, so that the writer finds what the next step has made of it."""

    def __init__(self) -> None:
        super().__init__()
        self._prepare = FileSystemWriterAsync.prepare_write_data
        self._prepared: tuple[Any, ...] = ()
        self._waiting: Callable[[], None] = lambda: None

    @contextmanager
    def in_force(self) -> Iterator[None]:
        def prepare(*writer_and_plan: Any) -> None:
            self._prepare(*writer_and_plan)
            self._prepared = writer_and_plan

        with super().in_force(), mock.patch.object(FileSystemWriterAsync, "prepare_write_data", prepare):
            yield

    def schedule(self, caller: TemporalAsyncCaller, request: AsyncRequest) -> None:
        self._waiting = partial(self._schedule, caller, request)

    def trained(self) -> None:
        writer, *_ = self._prepared
        handed_over = writer.write_buckets
        self._prepare(*self._prepared)
        handed_over[:] = writer.write_buckets
        self._waiting()


def _save(writing: type[Writing] | None, case: Case, model: str, folder: str) -> None:
    """Train, with a checkpoint after each step; it is written while the next step is trained, if there is a way to."""
    config, way = config_of(case, model), writing() if writing is not None else None
    with layout(case.parallel) as ranks, way.in_force() if way is not None else nullcontext():
        actor, pending = Actor(config, ranks), None
        for step in range(len(NAMES) + 1):
            train_step(actor, config, step, Outcome())
            if way is not None and pending is not None:
                own = pending.partial.glob(f"__{ranks.rank}_*.distcp")  # another rank may have trained it already
                assert list(own) == [], "nothing is written before the step is trained"
                way.trained()
            if pending is not None:
                pending.finish()
            if step < len(NAMES):
                pending = begin_checkpoint(
                    actor, folder, step + 1, {"next_step": step + 1}, Keeping(len(NAMES)), asynchronous=way is not None
                )


def _save_the_first_again(case: Case, model: str, folder: str) -> None:
    """A mistake: the state that was taken first is handed over each time."""
    original, taken = Actor.sharded_state, list[dict[str, Any]]()

    def copied(value: Any) -> Any:
        holds_tensor = isinstance(getattr(value, "data", None), torch.Tensor) and not isinstance(value, torch.Tensor)
        return replace(value, data=value.data.clone()) if holds_tensor else value

    def sharded_state(self: Actor) -> dict[str, Any]:
        if not taken:
            taken.append(original(self))
            dict_list_map_inplace(copied, taken[0])
        return dict(taken[0])

    with mock.patch.object(Actor, "sharded_state", sharded_state):
        _save(WrittenLate, case, model, folder)


# --- what they have saved --------------------------------------------------------------------------------------------


class Trainings:
    """Trainings with their checkpoints; each launch once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = layouts.save_models(folder, num_layers=2)["qwen2"]
        self.in_between = cache(self._in_between)

    def saved(self, distributed: bool, save: Callable[..., None], *arguments: Any) -> Saved:
        """What a training saves on two data-parallel ranks, over which its optimizer may be sharded."""
        folder = self.folder / str(len(list(self.folder.iterdir())))
        case = Case("saved", distributed=distributed)
        run_ranks(save, 2, *arguments, case, self.model, str(folder), timeout_s=PATIENCE_S)
        return {path.name: contents(path) for path in sorted(folder.glob("step_*"))}

    def _in_between(self, distributed: bool) -> Saved:
        """What is saved while nothing else is done."""
        return self.saved(distributed, _save, None)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> Trainings:
    return Trainings(tmp_path_factory.mktemp("trainings"))


@pytest.mark.parametrize("distributed", [True, False])
def test_each_holds_the_weights_and_the_optimizers_state_of_its_step(trainings: Trainings, distributed: bool) -> None:
    saved, expected = trainings.saved(distributed, _save, WrittenLate), trainings.in_between(distributed)
    assert list(saved) == list(expected) == NAMES
    assert [differing(saved[name], expected[name]) for name in NAMES] == [[]] * len(NAMES)
    kinds = ["decoder.", "embedding.", "optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.common."]
    assert [kind for kind in kinds if not any(name.startswith(kind) for name in saved[NAMES[0]])] == []
    for before, after in pairwise(NAMES):
        assert set(differing(saved[before], saved[after])) == set(saved[before]), "every step changes everything"


@pytest.mark.parametrize("distributed", [True, False])
def test_a_state_that_is_no_copy_is_noticed(trainings: Trainings, distributed: bool) -> None:
    saved, expected = trainings.saved(distributed, _save, TakenLate), trainings.in_between(distributed)
    for name, following in pairwise(NAMES):
        wrong = differing(saved[name], expected[name])
        assert [key for key in wrong if key.startswith("decoder.")] != []
        assert set(wrong) & set(differing(saved[name], expected[following])) == set(), "it is that of the next step"


def test_a_state_that_is_handed_over_again_is_noticed(trainings: Trainings) -> None:
    saved, expected = trainings.saved(True, _save_the_first_again), trainings.in_between(True)
    first, *others = NAMES
    assert differing(saved[first], expected[first]) == []
    for name in others:
        assert len(differing(saved[name], expected[name])) == len(saved[name])
        assert differing(saved[name], saved[first]) == []
