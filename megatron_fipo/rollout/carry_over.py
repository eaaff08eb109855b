"""What the ranks that generate take over from step to step: responses that are unfinished, or judged too early.

Each rank goes on with what it has begun itself, so that no token moves. What it has is in its memory, and in the ledger
before the step is decided that leaves it: a run that goes on from there reads it back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch.distributed import ProcessGroup

from megatron_fipo.config import RolloutSection
from megatron_fipo.metrics.reductions import Metrics, Sum
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import on_every_rank
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.ledger_lines import with_prompt
from megatron_fipo.rollout.source import Listener

CARRIED_TOKENS, DROPPED_TOKENS = "rollout/carried_tokens", "rollout/dropped_tokens"

Place = tuple[int, int]
"""(prompt_id, sample_index)"""


class CarryOver:
    """One rank's responses that go on. Every method says whether it is collective.

    Args:
        rollout: says how stale tokens may be, and what becomes of those that are staler.
        world: all ranks.
    """

    def __init__(
        self,
        rollout: RolloutSection,
        plane: DataPlane,
        ledger: RolloutLedger,
        listener: Listener,
        world: ProcessGroup,
    ) -> None:
        self._bound, self._drops = rollout.max_staleness_steps, rollout.too_stale == "drop"
        self._plane, self._ledger, self._listener, self._world = plane, ledger, listener, world
        self._step: int | None = None
        """The step that `_own` goes on in; None while nothing is read."""
        self._own: dict[Place, Carried] = {}
        self._num_expected = 0
        """Responses of all ranks that there should be, as the step before or a checkpoint says, on rank 0."""
        self._num_dropped_tokens = 0
        self.everywhere: set[Place] = set()
        """After `begin`: what any rank goes on with, or has judged."""
        self.judged_everywhere: set[Place] = set()
        """After `begin`: what any rank has judged."""

    @property
    def is_on(self) -> bool:
        """Whether anything is carried over."""
        return self._bound > 0

    @property
    def num_expected(self) -> int:
        """Responses of all ranks that the next step takes over, on rank 0."""
        return self._num_expected

    def expect(self, num_responses: int) -> None:
        """What there is was read from a checkpoint: the ledger should have so many. Local."""
        self._step, self._own, self._num_expected = None, {}, num_responses

    def begin(self, step: int, first_prompt: int, *, takes_up: bool = False) -> None:
        """Find what a step goes on with. Collective.

        Args:
            first_prompt: the first prompt that is not used up.
            takes_up: take what a killed run has recorded of the step itself, too, all of it: it may have come further
                in the order of prompts than this one will.

        Raises:
            ValueError: on every rank, if the ledger is damaged.
        """
        if not self.is_on:
            return
        if self._step != step:
            self._read(step)
        if takes_up:
            self._take_up(step)
        own = {place: one for place, one in self._own.items() if place[0] >= first_prompt}
        stale = [place for place, one in own.items() if self._drops and step - one.begun_at_step > self._bound]
        self._num_dropped_tokens = sum(own.pop(place).num_tokens for place in stale)
        places = np.array([(*place, one.is_judged) for place, one in own.items()], np.int64).reshape(-1, 3)
        parts = self._plane.gathered([places.tobytes()])
        told: bytes = exchange.broadcast_object(b"".join(parts), self._world)
        all_places = np.frombuffer(told, np.int64).reshape(-1, 3).tolist()
        self.everywhere = {(prompt_id, index) for prompt_id, index, _ in all_places}
        self.judged_everywhere = {(prompt_id, index) for prompt_id, index, is_judged in all_places if is_judged}
        # What goes on here may have been finished by a rank that is not there any more.
        self._own = {place: one for place, one in own.items() if one.is_judged or place not in self.judged_everywhere}

    def _read(self, step: int) -> None:
        """Take what the ledger has of this rank's."""
        leader, num_leaders = self._plane.leader, self._plane.num_leaders
        found = on_every_rank(
            lambda: [] if leader is None else self._ledger.carried(step, leader, num_leaders), self._world
        )
        self._own, self._step = {_place(one.response.key): one for one in found}, step
        num_found = sum(self._plane.gathered([len(found)]))
        if self._world.rank() == 0 and num_found < self._num_expected:
            self._listener.warning(
                f"step {step}: {self._num_expected - num_found} responses that were to go on are not recorded any "
                "more; they are begun anew",
                kind="responses that were to go on",
            )

    def _take_up(self, step: int) -> None:
        """Hold this rank's share of the step's own records."""
        leader, num_leaders = self._plane.leader, self._plane.num_leaders
        found = on_every_rank(
            lambda: [] if leader is None else self._ledger.shared_out(step, leader, num_leaders), self._world
        )
        self._own |= {_place(one.key): Carried(one, _begun_at(one, step), is_judged=True) for one in found}

    def unfinished(self, prompt_of: Callable[[int], Prompt]) -> list[tuple[Prompt, Carried]]:
        """This rank's responses that go on or are still to be judged, in the order of prompts. Local."""
        return [
            (prompt_of(place[0]), one) for place, one in sorted(self._own.items(), key=_by_place) if not one.is_judged
        ]

    def judged(self, prompt_of: Callable[[int], Prompt]) -> list[tuple[Prompt, Carried]]:
        """This rank's responses that have their verdict, in the order of prompts. Local."""
        found = []
        for place, one in sorted(self._own.items(), key=_by_place):
            if one.is_judged:
                prompt = prompt_of(place[0])
                with_prompt(one.response, prompt)
                found.append((prompt, one))
        return found

    def keep(self, step: int, held: Held, left: list[Carried], next_prompt: int) -> None:
        """Keep and record what the step after this one goes on with. Local.

        Args:
            held: all that this rank has of judged responses.
            left: what it has begun that is not judged.
            next_prompt: the first prompt of the next step.

        Raises:
            DiskError: if it cannot be written.
        """
        judged = [
            Carried(sample, _begun_at(sample, step), is_judged=True)
            for place, sample in held.samples.items()
            if place[0] >= next_prompt
        ]
        unfinished = [one for one in left if one.response.key.prompt_id >= next_prompt]
        found = {_place(one.response.key): one for one in (*judged, *unfinished)}
        # On ranks that generate nothing, too: all of them know that nothing need be read for the next step.
        self._own, self._step = dict(sorted(found.items(), key=_by_place)), step + 1
        if self._plane.leader is not None:
            self._ledger.write_carried(step + 1, self._plane.leader, self._own.values())

    def keep_recorded(self, step: int, num_responses: int) -> None:
        """A step was taken from its records: take what the step after it goes on with, too. Collective.

        Args:
            num_responses: of all ranks that were recorded, on rank 0.

        Raises:
            ValueError: on every rank, if the ledger is damaged.
        """
        self._num_expected = num_responses
        self._read(step + 1)

    def count(self) -> int:
        """Responses of all ranks that the next step goes on with, on rank 0; 0 elsewhere. Collective."""
        self._num_expected = sum(self._plane.gathered([len(self._own)]))
        return self._num_expected

    def metrics(self) -> Metrics:
        """This rank's part of the metrics of a step."""
        carried = sum(one.num_tokens for one in self._own.values())
        return {CARRIED_TOKENS: Sum(carried), DROPPED_TOKENS: Sum(self._num_dropped_tokens)} if self.is_on else {}


def _begun_at(sample: Trajectory, step: int) -> int:
    """The step whose weights wrote a response's first token; where no version was recorded, the present one."""
    return min((version for version, _, _ in sample.policy_versions), default=step)


def _place(key: SampleKey) -> Place:
    return key.prompt_id, key.sample_index


def _by_place(item: tuple[Place, Carried]) -> Place:
    return item[0]
