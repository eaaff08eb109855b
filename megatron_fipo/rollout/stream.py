"""Keeps one rank's engine full with responses in the order of prompts, until no more are wanted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch

from megatron_fipo.environments.environment import Environment
from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.collect import speaker
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams, StoppableEngine, Turn, sample_seed

LOOKS_EVERY_S = 0.02
"""Time between two looks at what other ranks have said."""
_ABORT_AGAIN_S = 0.5
"""Pause before requests are aborted that were on their way to the engine when it was told to abort all."""
STRETCH_STEPS = 16
"""Decoding steps from one meeting of the ranks to the next, where a step's end must not depend on time."""
_MEETING_LOOKS_EVERY_S = 0.001
"""Time between two looks of an engine that rests, whether the others have come."""


class Stream:
    """One rank's part of a step that streams.

    A response begins as soon as another one is written, not when that is judged: which responses an engine decodes side
    by side does not depend on how long verifiers take.

    Where what is unfinished at the end goes on in the next step, the end itself must not depend on time either, if the
    run is to be repeatable. Then ranks meet: each decodes so many steps, waits for the verdicts of all that it has
    written, and tells them; rank 0 decides on all of these, and all go on or end there.

    Args:
        engine: generates.
        environment: plays and judges.
        work: says which response is next, and whether any is wanted. A ticket counts responses, prompt after prompt.
        key_of: the prompt and the key of a ticket's response.
        recorded: a response that need not be generated, since it is recorded; None: it must be.
        on_written: called with each trajectory that was generated and judged, before `on_judged`, to record it.
        on_judged: called with each judged trajectory, in order of completion; aborted ones are none.
        look: called now and then, and after each judged trajectory; where ranks meet only there, on rank 0.
        carried: responses that go on before any ticket is taken, in this order, with their prompts.
        version: of the weights with which it begins; None: the step's own.
        keeps: keep what is begun and not judged in `left`.
        meets: end where ranks meet; the engine must be a `StoppableEngine`.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        environment: Environment,
        work: OrderedWork,
        *,
        sampling: SamplingParams,
        run_seed: int,
        step: int,
        key_of: Callable[[int], tuple[Prompt, SampleKey]],
        recorded: Callable[[Prompt, SampleKey], Trajectory | None],
        on_written: Callable[[Trajectory], None],
        on_judged: Callable[[Prompt, Trajectory], None],
        look: Callable[[], None],
        carried: Sequence[tuple[Prompt, Carried]] = (),
        version: int | None = None,
        keeps: bool = False,
        meets: bool = False,
    ) -> None:
        self._engine, self._environment, self._work = engine, environment, work
        self._sampling, self._run_seed, self._step = sampling, run_seed, step
        self._key_of, self._recorded, self._look = key_of, recorded, look
        self._on_written, self._on_judged = on_written, on_judged
        self._waiting, self._keeps, self._meets = deque(carried), keeps, meets
        self.version = step if version is None else version
        """Of the weights with which responses are begun from now on. May be set from another thread."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_written = 0
        self._num_begun = 0
        self._num_going_on = 0
        """Of those begun and not written, the ones for which no ticket was taken."""
        self._speaking: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self._is_aborted = False
        self.num_unused_tokens = 0
        """Tokens of responses that were begun, are not judged, and were not kept."""
        self.left: list[Carried] = []
        """After `run`, by key: what was begun, is not judged, and was kept."""

    async def run(self) -> None:
        """Generate until no more is wanted.

        Raises:
            Exception: the first error of the engine or the environment; all else in flight is cancelled first.
        """
        self._changed = asyncio.Event()
        try:
            await (self._from_meeting_to_meeting() if self._meets else self._until_over())
        finally:
            await self._abort()
        if self._failures:
            raise self._failures[0]
        self.left += [carried for _, carried in self._waiting]
        self.left.sort(key=lambda one: one.response.key)

    def abort(self) -> None:
        """End the work on all ranks, before anything else begins here. Safe in a signal handler, and in any thread."""
        self._is_aborted = True

    async def _until_over(self) -> None:
        self._fill()
        while not self._work.look() and not self._failures:
            if self._is_aborted:
                self._work.end()
                break
            await self._wait(LOOKS_EVERY_S)
            self._look()
            self._fill()  # there may be more tickets now

    async def _from_meeting_to_meeting(self) -> None:
        engine = self._engine
        assert isinstance(engine, StoppableEngine), "only such an engine stops at a given step"
        engine.allow(0)
        try:
            while True:
                self._fill()
                # What is begun must have come to the engine before it goes on: it might find it one step later.
                if not await self._reached(lambda: self._tasks <= self._speaking):
                    return
                engine.allow(STRETCH_STEPS, self._changed.set)
                if not await self._reached(lambda: engine.is_at_rest or not self._is_writing):
                    return
                engine.allow(0)
                if not await self._reached(lambda: self._tasks <= self._speaking):  # all verdicts are there
                    return
                self._work.come()
                if not await self._reached(lambda: self._work.is_met(self._look), _MEETING_LOOKS_EVERY_S):
                    return
                if self._work.look():
                    return
        finally:
            await self._abort()
            engine.allow(None)

    @property
    def _is_writing(self) -> bool:
        """Whether the engine has anything to do, or is about to."""
        return bool(self._speaking) or self._num_begun > self._num_written

    async def _reached(self, condition: Callable[[], bool], looks_every_s: float = LOOKS_EVERY_S) -> bool:
        """Wait for a condition; False if a failure, an abort here or an end elsewhere came first."""
        while not condition():
            if self._failures or self._work.look():
                return False
            if self._is_aborted:
                self._work.end()
                return False
            await self._wait(looks_every_s)
        return not self._failures

    async def _wait(self, longest_s: float) -> None:
        """Until a response has ended, or the time is over."""
        self._changed.clear()
        with suppress(TimeoutError):  # not wait_for, which takes a cancellation for an end of what it waits for
            async with asyncio.timeout(longest_s):
                await self._changed.wait()

    def _fill(self) -> None:
        """Begin responses while the engine has room, and this rank has less than its share of what there is."""
        while not (self._failures or self._is_aborted):
            num_in_flight = self._num_begun - self._num_written
            if num_in_flight >= self._engine.capacity:
                return
            if self._waiting:
                prompt, carried = self._waiting.popleft()
                self._begin(prompt, carried.response.key, carried)
                continue
            share = self._work.fair_share
            if share is not None and num_in_flight - self._num_going_on >= share:
                return
            ticket = self._work.take()
            if ticket is None:
                return
            self._begin(*self._key_of(ticket), None)

    def _begin(self, prompt: Prompt, key: SampleKey, carried: Carried | None) -> None:
        known = self._recorded(prompt, key)
        if known is not None:
            self._on_judged(prompt, known)
            if not self._meets:
                self._look()
            return
        self._num_begun += 1
        self._num_going_on += carried is not None
        task = asyncio.ensure_future(self._play(prompt, key, carried))
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def _play(self, prompt: Prompt, key: SampleKey, carried: Carried | None) -> None:
        begun_at_step = self.version if carried is None else carried.begun_at_step
        seed = sample_seed(self._run_seed, begun_at_step, key.prompt_id, key.sample_index)
        speak = speaker(self._engine, prompt, key, self._sampling, self._step, seed, carried)
        first_turn: Turn | None = None
        num_turns = 0
        num_tokens = 0

        async def counted(response_so_far: Sequence[int]) -> Turn:
            nonlocal first_turn, num_turns, num_tokens
            task = asyncio.current_task()
            assert task is not None
            if self._work.is_over:  # whatever was asked now would come too late to be aborted
                raise asyncio.CancelledError
            self._speaking.add(task)
            num_turns += 1
            try:
                turn = await speak(response_so_far)
            finally:
                self._speaking.discard(task)
            num_tokens = len(response_so_far) + sum(len(segment.token_ids) for segment in turn.segments)
            if first_turn is None:  # an environment that answers lets the policy speak again, in the same place
                first_turn = turn
                self._num_written += 1
                self._num_going_on -= carried is not None
                if self._meets:
                    self._changed.set()
                if not self._work.is_over:
                    self._fill()
            return turn

        judged = False
        try:
            trajectory = await self._environment.play(prompt, key, counted)
            if trajectory.finish_reason != "abort":
                judged = True
                self._on_written(trajectory)
                self._on_judged(prompt, trajectory)
                if not self._meets:
                    self._look()
            elif not self._work.is_over:  # somebody has told the engine, and it alone, to end all that is in flight
                self.abort()
        finally:
            if not judged and self._keeps and num_turns <= 1:
                self._keep(prompt, key, first_turn, begun_at_step, carried)
            elif not judged:
                self.num_unused_tokens += num_tokens

    def _keep(
        self, prompt: Prompt, key: SampleKey, turn: Turn | None, begun_at_step: int, carried: Carried | None
    ) -> None:
        """Keep what is written of a response; where nothing is, the next step begins it."""
        if turn is not None and turn.segments:
            prompt_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
            response = Trajectory(key, prompt_ids, turn.segments, turn.finish_reason)
            self.left.append(Carried(response, begun_at_step, is_judged=False))
        elif carried is not None:
            self.left.append(carried)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failures.append(error)
        self._changed.set()

    async def _abort(self) -> None:
        """End what is in flight, and wait until nothing is."""
        self._work.leave()
        cancelled: set[asyncio.Task[None]] = set()
        while self._tasks:
            # Some that are still speaking will have ended by themselves meanwhile: their verdicts are not waited for.
            judging = self._tasks - self._speaking - cancelled
            for task in judging:
                task.cancel()
            cancelled |= judging
            self._engine.abort()
            await asyncio.wait({*self._tasks}, timeout=_ABORT_AGAIN_S)
