"""Where a run is: it moves on, is saved, is found again, and is left after a signal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_fipo.actor.trained import UpdateResult
from megatron_fipo.parallel import exchange
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.run.parts import RunParts
from megatron_fipo.run.resume import ResumePoint


class Interrupted(Exception):  # noqa: N818 - no error: it is what was asked for
    """The run was asked to stop, and its state is saved."""


class Place:
    """A run's place in its loop. Its methods are collective over all ranks.

    Attributes:
        at: what the run goes on from if it is stopped now.
    """

    def __init__(self, parts: RunParts) -> None:
        self._parts, self._config, self._ranks = parts, parts.config, parts.ranks
        self.at = self._point(0)

    @property
    def is_at_its_end(self) -> bool:
        """Whether no step is left, or the run's rule has ended it."""
        return self.at.step >= self._config.train.num_steps or bool(self._parts.ending.ended_by)

    def move_to(self, step: int, *, evaluation_is_due: bool = False) -> None:
        """All before this step is done."""
        self.at = self._point(step, evaluation_is_due=evaluation_is_due)

    def add_update(self, result: UpdateResult, minibatches: list[list[PackedBatch]]) -> None:
        """Another update of the present step is made, on one of its minibatches."""
        self.at = replace(self.at, updates=(*self.at.updates, result), minibatches=minibatches)

    def leave_if_asked(self) -> None:
        """Save and leave if any rank has received a signal: after every update, around every generation.

        Raises:
            Interrupted: on every rank, then.
        """
        if exchange.any_rank(self._parts.interrupt.received is not None, self._ranks.world):
            self.save()
            raise Interrupted

    def save_if_due(self) -> None:
        """Between steps: the last one is followed by a checkpoint in any case."""
        self._parts.saved.poll()
        every = self._config.checkpoint.every_num_steps
        if every and self.at.step % every == 0 and not self.is_at_its_end:
            self.save(in_background=True)

    def finish(self) -> None:
        """Save that nothing is left to do."""
        self.at = self._point(self.at.step, finished=True)
        self.save()

    def save(self, *, in_background: bool = False) -> None:
        """Write a checkpoint.

        Raises:
            CheckpointError: if it could not be written.
        """
        state = self.at.state(self._ranks)
        self._parts.records.check()
        self._parts.source.take_back(self._parts.actor)  # the actor's weights may be lent out
        self._parts.saved.save(state, in_background=in_background)

    def resume(self) -> bool:
        """Take up what was saved, if anything; whether the run has nothing left to do.

        Raises:
            ValueError: if the run cannot resume from what was saved.
        """
        parts, state = self._parts, self._parts.saved.restore()
        if state is None:
            return False
        parts.source.load_state_dict(state)
        self.at = ResumePoint.from_state(state, self._ranks, parts.source.state())
        if self.at.best:
            parts.best.load_state_dict(self.at.best)
        parts.ending.restore(self.at.ended_by)
        return self.at.finished and self.is_at_its_end

    def _point(self, step: int, **more: Any) -> ResumePoint:
        parts = self._parts
        return ResumePoint(step, parts.source.state(), parts.best.state_dict(), parts.ending.ended_by, **more)
