"""The source of the trainer's batches, which owns prompts, dynamic sampling, engine and environments."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.rl.trajectory import Group, Prompt
from megatron_fipo.rollout.engine import Policy


@dataclass(frozen=True)
class StepRollouts:
    """What one step trains on. The same on every rank.

    Attributes:
        groups: the groups to train on, in prompt order, with rewards.
        generated: all groups that were generated for the step, including those dropped or kept for later.
    """

    groups: list[Group]
    generated: list[Group]


class RolloutSource(Protocol):
    """Gives the trainer its batches. Every method but `close` is collective over all ranks.

    A step is `give`, `batch`, `take_back`, in this order. A run that was stopped anywhere in a step continues from the
    `state_dict` of before the step.
    """

    def give(self, policy: Policy, version: int) -> None:
        """Generate with this version of the policy from now on; see `RolloutEngine.give`."""
        ...

    def batch(self, step: int, *, only_recorded: bool = False) -> StepRollouts:
        """The rollouts of a step.

        Args:
            only_recorded: take every response from the records: the policy that wrote them is gone.

        Raises:
            BatchNotFilledError: if too few groups carry a signal.
            ValueError: if records are damaged, or missing with `only_recorded`.
        """
        ...

    def take_back(self, policy: Policy) -> None:
        """Give the policy its memory back; see `RolloutEngine.take_back`."""
        ...

    def metrics(self) -> Metrics:
        """What the step's rollouts and the last `give` took; call it once for each step, after `batch`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state that decides the next batch, as plain containers and tensors. The same on every rank; local."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`, which may hold further entries."""
        ...

    def close(self) -> None:
        """Release what the source holds."""
        ...


class PromptOrder(Protocol):
    """An endless, deterministic order of prompts."""

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the order."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position."""
        ...


class Progress(Protocol):
    """A progress display."""

    def advance(self, count: int = 1) -> None:
        """Show that `count` further responses are done."""
        ...


class Listener(Protocol):
    """Shows the user the progress of rollouts, and warnings about them."""

    def rollout_progress(self, step: int, total: int) -> AbstractContextManager[Progress]:
        """A display for this rank's responses of one round."""
        ...

    def warning(self, text: str, kind: str = "") -> None:
        """Show a warning, in full sentences; of each kind only the first, tenth, hundredth … is shown."""
        ...
