"""Evaluations in the course of a run, and what hangs on them: the best model, and the rule that ends it."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_fipo.parallel.agreement import on_every_rank, on_leader
from megatron_fipo.run.parts import RunParts
from megatron_fipo.run.place import Place


class Scoring:
    """Evaluates the policy as it is. Its methods are collective over all ranks."""

    def __init__(self, parts: RunParts, place: Place) -> None:
        self._parts, self._place, self._world = parts, place, parts.ranks.world

    def at_the_start(self) -> None:
        """Before the first step; and the evaluation that a run was stopped in before."""
        parts, at = self._parts, self._place.at
        if at.step == 0:
            # A first step that was stopped half-way has been evaluated before, and its weights have moved since.
            before = self._recorded_before() if at.updates else self._evaluate("before")
            parts.best.note(0, before)
            parts.records.write(0, before)
        if at.evaluation_is_due:
            self.after_step()

    def after_step_if_due(self) -> None:
        """Every evaluation.every_num_steps steps."""
        if self.is_due_after(self._place.at.step - 1):
            self.after_step()

    def is_due_after(self, step: int) -> bool:
        """Whether an evaluation follows a step."""
        every = self._parts.config.evaluation.every_num_steps
        return bool(every) and (step + 1) % every == 0

    def after_step(self) -> None:
        """Evaluate after a step; a run that is stopped in it evaluates again when it goes on."""
        parts, step = self._parts, self._place.at.step
        self._place.move_to(step, evaluation_is_due=True)
        scores = self._evaluate(f"step_{step:06d}", announce=False)
        self._keep_if_best(scores)
        parts.ending.note_scores(scores, step)
        parts.records.write(step - 1, scores)
        self._place.move_to(step)

    def at_the_end(self) -> None:
        """After the last step, with a comparison."""
        after = self._evaluate("after", compare=True)
        self._keep_if_best(after)
        self._parts.records.write(self._place.at.step, after)

    def _evaluate(self, when: str, *, compare: bool = False, announce: bool = True) -> dict[str, float]:
        parts = self._parts
        parts.source.give(parts.actor, self._place.at.step)
        parts.records.check()
        return on_every_rank(lambda: parts.evaluation.run(when, compare=compare, announce=announce), self._world)

    def _recorded_before(self) -> dict[str, float]:
        return on_leader(self._parts.evaluation.scores_before, self._world) or {}

    def _keep_if_best(self, scores: Mapping[str, float]) -> None:
        """Keep the model where it is the best so far."""
        parts = self._parts
        if not parts.config.checkpoint.keep_best:
            return
        parts.source.take_back(parts.actor)  # its weights may be lent out
        if said := on_every_rank(lambda: parts.best.note(self._place.at.step, scores), self._world):
            parts.console.info(said)
