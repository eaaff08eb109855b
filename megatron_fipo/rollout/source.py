"""The source of the trainer's batches, which owns prompts, dynamic sampling, engine and environments."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray

from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Prompt, Trajectory
from megatron_fipo.rollout.engine import Policy
from megatron_fipo.rollout.held import Held


@dataclass(frozen=True)
class JudgedStep:
    """What is known of a step's responses without their tokens, on rank 0 alone.

    Attributes:
        trained_on: the step's groups, in prompt order, with rewards and advantages.
        generated: all groups that were generated for the step, including those dropped or kept for later, with rewards.
    """

    trained_on: list[JudgedGroup]
    generated: list[JudgedGroup]


@dataclass(frozen=True)
class StepRollouts:
    """What one step trains on.

    Attributes:
        plan: PLANNED [responses that the step trains on], in the batch's order; the same on every rank.
        group_sizes: responses of each of the batch's groups; the same on every rank.
        held: the responses whose tokens this rank holds: of the batch, and of all that the step generated.
        judged: on rank 0.
    """

    plan: NDArray[Any]
    group_sizes: list[int]
    held: Held
    judged: JudgedStep | None

    def trajectory(self, index: int) -> Trajectory:
        """What this rank holds of the batch, by its place in it."""
        planned = self.plan[index]
        return self.held.samples[int(planned["prompt_id"]), int(planned["sample_index"])]


class SourceState(Protocol):
    """What decides a source's next batch, as this rank has it."""

    def gathered(self) -> dict[str, Any]:
        """Plain containers and tensors, for a checkpoint; the same on every rank. Collective over all ranks."""
        ...


class RolloutSource(Protocol):
    """Gives the trainer its batches. Every method but `close` is collective over all ranks.

    A step is `give`, `batch`, `take_back`, in this order. A run that was stopped anywhere in a step continues from the
    `state` of before the step.
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

    def begin(self, step: int) -> None:
        """Generate for a step from now on, while the one before it trains, with weights of that; `give` and `batch` of
        the step follow. Only with rollout.overlap, after the `batch` of the step before.
        """
        ...

    def stop(self) -> None:
        """End what `begin` has begun: its step is not asked for."""
        ...

    def metrics(self) -> Metrics:
        """What the step's rollouts and the last `give` took; call it once for each step, after `batch`."""
        ...

    def state(self) -> SourceState:
        """The state that decides the next batch. Local: nothing is copied before `SourceState.gathered`."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `SourceState.gathered` gave, which may hold further entries. Local."""
        ...

    def close(self) -> None:
        """Release what the source holds."""
        ...


class PromptOrder(Protocol):
    """An endless, deterministic order of prompts."""

    @property
    def position(self) -> int:
        """The first prompt that nobody has used."""
        ...

    def prompt(self, prompt_id: int) -> Prompt:
        """The prompt at a position, from 0; the same every time."""
        ...

    def move_to(self, prompt_id: int) -> None:
        """All prompts before this one are used."""
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
