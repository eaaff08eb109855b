"""The place from which a run resumes, as data, and its form in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_fipo.actor.trained import UpdateResult
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.token_values import gather_old_log_probs
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rollout.source import SourceState
from megatron_fipo.run.step_report import gather_results, restore_results


@dataclass(frozen=True)
class ResumePoint:
    """A place in the loop, besides the actor's weights and the recorded rollouts.

    Attributes:
        step: the step that comes next, or whose updates are partly made.
        rollouts: the source's state before that step.
        best: state of the best model so far; empty where a version without one saved it.
        ended_by: the rule of train.stop_when that ended the run; empty: none did.
        evaluation_is_due: whether the policy is to be evaluated before anything else.
        finished: whether nothing is left to do.
        updates: this rank's results of the step's updates that are made, in order.
        minibatches: what they are made on. Its old log-probs are gathered when the point is saved: the weights that
            gave them are gone.
        old_log_probs: the same after a restart, see `gather_old_log_probs`.
    """

    step: int
    rollouts: SourceState
    best: Mapping[str, float]
    ended_by: str = ""
    evaluation_is_due: bool = False
    finished: bool = False
    updates: tuple[UpdateResult, ...] = ()
    minibatches: Sequence[Sequence[PackedBatch]] = ()
    old_log_probs: Mapping[int, tuple[Tensor, Tensor]] | None = None

    def state(self, ranks: ParallelGroups) -> dict[str, Any]:
        """Return the point as plain containers and tensors, the same on every rank. Collective over all ranks."""
        state: dict[str, Any] = {"next_step": self.step, **self.rollouts.gathered()}
        state |= {"best": self.best, "ended_by": self.ended_by}
        state |= {"evaluation_is_due": True} if self.evaluation_is_due else {}
        state |= {"finished": True} if self.finished else {}
        if self.updates:
            old_log_probs = self.old_log_probs
            state |= {
                "num_updates": len(self.updates),
                "old_log_probs": gather_old_log_probs(self.minibatches, ranks) if self.minibatches else old_log_probs,
                "results": gather_results(self.updates, ranks),
            }
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any], ranks: ParallelGroups, rollouts: SourceState) -> ResumePoint:
        """The point whose `state` this is, in whatever layout it was saved. No communication.

        Args:
            rollouts: the state of a source that has taken up its part of `state`.
        """
        is_half_step = bool(state.get("num_updates"))
        return cls(
            step=state["next_step"],
            rollouts=rollouts,
            best=state.get("best", {}),
            ended_by=state.get("ended_by", ""),
            evaluation_is_due=state.get("evaluation_is_due", False),
            finished=state.get("finished", False),
            updates=tuple(restore_results(state["results"], ranks)) if is_half_step else (),
            old_log_probs=state["old_log_probs"] if is_half_step else None,
        )
