"""Where the trainer's batches come from: what owns prompts, dynamic sampling, engine and environments."""

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
        groups: to train on, in prompt order, rewards assigned.
        generated: all that were generated for it, those that were dropped or kept for later included.
    """

    groups: list[Group]
    generated: list[Group]


class RolloutSource(Protocol):
    """Gives the trainer its batches. Every method but `close` is collective over all ranks.

    A step is `give`, `batch`, `take_back`, in this order; `state_dict` before it is what a run goes on from that was
    stopped anywhere in it.
    """

    def give(self, policy: Policy, version: int) -> None:
        """Generate with this version of the policy from now on; see `RolloutEngine.give`."""
        ...

    def batch(self, step: int, *, only_recorded: bool = False) -> StepRollouts:
        """The rollouts of a step.

        Args:
            only_recorded: take every response from what was recorded of it: the policy that wrote them is gone.

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
        """What the next batch follows from, as plain containers and tensors. The same on every rank; no collective."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`, which may hold more."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class PromptOrder(Protocol):
    """An endless, deterministic order of prompts."""

    def take(self, count: int) -> list[Prompt]:
        """The next ones."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        ...


class Progress(Protocol):
    """A progress display."""

    def advance(self, count: int = 1) -> None:
        """So many responses more are there."""
        ...


class Listener(Protocol):
    """Who hears what a user should know of rollouts."""

    def rollout_progress(self, step: int, total: int) -> AbstractContextManager[Progress]:
        """A display for this rank's responses of one round."""
        ...

    def warning(self, text: str, kind: str = "") -> None:
        """Something in full sentences; of one kind the first, tenth, hundredth … is told."""
        ...
