"""Keeps one rank's engine full with responses in the order of prompts, until no more are wanted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from megatron_fipo.environments.environment import Environment
from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.collect import speaker
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams, Turn

LOOKS_EVERY_S = 0.02
"""Time between two looks at what other ranks have said."""
_ABORT_AGAIN_S = 0.5
"""Pause before requests are aborted that were on their way to the engine when it was told to abort all."""


class Stream:
    """One rank's part of a step that streams.

    A response begins as soon as another one is written, not when that is judged: which responses an engine decodes side
    by side does not depend on how long verifiers take.

    Args:
        engine: generates.
        environment: plays and judges.
        work: says which response is next, and whether any is wanted. A ticket counts responses, prompt after prompt.
        key_of: the prompt and the key of a ticket's response.
        recorded: a response that need not be generated, since it is recorded; None: it must be.
        on_written: called with each trajectory that was generated and judged, before `on_judged`, to record it.
        on_judged: called with each judged trajectory, in order of completion; aborted ones are none.
        look: called now and then, and after each judged trajectory.
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
    ) -> None:
        self._engine, self._environment, self._work = engine, environment, work
        self._sampling, self._run_seed, self._step = sampling, run_seed, step
        self._key_of, self._recorded, self._look = key_of, recorded, look
        self._on_written, self._on_judged = on_written, on_judged
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_written = 0
        self._num_begun = 0
        self._speaking: set[asyncio.Task[None]] = set()
        self._failures: list[BaseException] = []
        self._is_aborted = False
        self.num_unused_tokens = 0
        """Tokens of responses that were begun and are not judged."""

    async def run(self) -> None:
        """Generate until no more is wanted.

        Raises:
            Exception: the first error of the engine or the environment; all else in flight is cancelled first.
        """
        self._changed = asyncio.Event()
        try:
            self._fill()
            while not self._work.look() and not self._failures:
                if self._is_aborted:
                    self._work.end()
                    break
                self._changed.clear()
                with suppress(TimeoutError):  # not wait_for, which takes a cancellation for an end of what it waits for
                    async with asyncio.timeout(LOOKS_EVERY_S):
                        await self._changed.wait()
                self._look()
                self._fill()  # there may be more tickets now
        finally:
            await self._abort()
        if self._failures:
            raise self._failures[0]

    def abort(self) -> None:
        """End the work on all ranks, before anything else begins here. Safe in a signal handler, and in any thread."""
        self._is_aborted = True

    def _fill(self) -> None:
        """Begin responses while the engine has room, and this rank has less than its share of what there is."""
        while not (self._failures or self._is_aborted):
            share = self._work.fair_share
            room = self._engine.capacity if share is None else min(self._engine.capacity, share)
            if self._num_begun - self._num_written >= room:
                return
            ticket = self._work.take()
            if ticket is None:
                return
            prompt, key = self._key_of(ticket)
            known = self._recorded(prompt, key)
            if known is not None:
                self._on_judged(prompt, known)
                continue
            self._num_begun += 1
            task = asyncio.ensure_future(self._play(prompt, key))
            self._tasks.add(task)
            task.add_done_callback(self._ended)

    async def _play(self, prompt: Prompt, key: SampleKey) -> None:
        speak = speaker(self._engine, prompt, key, self._sampling, self._run_seed, self._step)
        has_written = False
        num_tokens = 0

        async def counted(response_so_far: Sequence[int]) -> Turn:
            nonlocal has_written, num_tokens
            task = asyncio.current_task()
            assert task is not None
            if self._work.is_over:  # whatever was asked now would come too late to be aborted
                raise asyncio.CancelledError
            self._speaking.add(task)
            try:
                turn = await speak(response_so_far)
            finally:
                self._speaking.discard(task)
            num_tokens = len(response_so_far) + sum(len(segment.token_ids) for segment in turn.segments)
            if not has_written:  # an environment that answers lets the policy speak again, in the same place
                has_written = True
                self._num_written += 1
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
            elif not self._work.is_over:  # somebody has told the engine, and it alone, to end all that is in flight
                self.abort()
        finally:
            if not judged:
                self.num_unused_tokens += num_tokens

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
