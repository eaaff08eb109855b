"""A stream that goes on with what an earlier step has begun, keeps what it leaves, and ends where ranks meet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from megatron_fipo.environments.single_turn import SingleTurn
from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Segment, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, Turn, sample_seed
from megatron_fipo.rollout.stream import STRETCH_STEPS, Stream
from megatron_fipo.verifiers.verdict import Verdict
from tests.unit.test_stream import PROMPTS, SteppedEngine
from tests.unit.test_stream_ends import until, works

STEP = 3


class StoppableSteppedEngine(SteppedEngine):
    """`SteppedEngine` that rests; a request with a prefix needs so many tokens fewer."""

    repeatable = True

    def __init__(self, length_of: Callable[[int, int], int]) -> None:
        super().__init__(length_of)
        self._left: int | None = None
        self._on_rest: Callable[[], None] = lambda: None

    def allow(self, num_steps: int | None, on_rest: Callable[[], None] = lambda: None) -> None:
        self._left, self._on_rest = num_steps, on_rest

    @property
    def is_at_rest(self) -> bool:
        return self._left == 0

    async def _decode(self) -> None:
        while self._waiting or self._running:
            if self._left == 0:
                await asyncio.sleep(0.001)
                continue
            while self._waiting and len(self._running) < self.num_slots:
                self._running.append([*self._waiting.pop(0), 0])
            self.beside.append([request.sample_id for request, _, _ in self._running])
            for entry in [*self._running]:
                entry[2] += 1
                request, future, length = entry
                if length + len(request.prefix) >= self._length_of(request.group_id, request.sample_index):
                    self._running.remove(entry)
                    self._answer(request, future, length, "stop")
            if self._left is not None:
                self._left -= 1
                if self._left == 0:
                    self._on_rest()
            await asyncio.sleep(0)


def carried(
    prompt_id: int, index: int, num_tokens: int, reason: str = "abort", step: int = 2
) -> tuple[Prompt, Carried]:
    segment = Segment(torch.full((num_tokens,), prompt_id), "policy", torch.ones(num_tokens), step)
    response = Trajectory(SampleKey("s", prompt_id, index), torch.empty(0, dtype=torch.int64), [segment], reason)
    return PROMPTS[prompt_id], Carried(response, step, is_judged=False)


class Step:
    """A stream over two samples of each prompt, those that are carried left out, until so many are judged."""

    def __init__(
        self,
        engine: Any,
        num_wanted: int,
        going_on: list[tuple[Prompt, Carried]] | None = None,
        judge: Callable[[Prompt], Any] | None = None,
        work: OrderedWork | None = None,
        **options: Any,
    ) -> None:
        self.work = work or OrderedWork(0, 1, 100, is_dealt=True, store=HashStore())
        self.judged: list[Trajectory] = []
        self.at_meetings: list[int] = []
        begun = {(one.response.prompt_id, one.response.sample_index) for _, one in going_on or []}
        fresh = [divmod(number, 2) for number in range(200) if divmod(number, 2) not in begun]

        async def right(prompt: Prompt, text: str, reason: str) -> Verdict:
            if judge is not None:
                await judge(prompt)
            return Verdict(1.0)

        def on_judged(prompt: Prompt, sample: Trajectory) -> None:
            self.judged.append(sample)
            self.work.tell(b"one")

        def look() -> None:
            self.at_meetings.append(len(self.judged))
            self.num_heard = getattr(self, "num_heard", 0) + len(self.work.told())
            if self.num_heard >= num_wanted:
                self.work.end()

        self.stream = Stream(
            engine,
            SingleTurn(right, lambda ids: ""),
            self.work,
            sampling=SamplingParams(1000),
            run_seed=0,
            step=STEP,
            key_of=lambda ticket: (PROMPTS[fresh[ticket][0]], SampleKey("s", *fresh[ticket])),
            recorded=lambda prompt, key: None,
            on_written=lambda sample: None,
            on_judged=on_judged,
            look=look,
            carried=going_on or [],
            **options,
        )

    def run(self) -> None:
        asyncio.run(asyncio.wait_for(self.stream.run(), 60))


def outline(found: list[Carried]) -> list[tuple[tuple[int, int], int, int, str]]:
    return [
        (
            (one.response.prompt_id, one.response.sample_index),
            one.num_tokens,
            one.begun_at_step,
            one.response.finish_reason,
        )
        for one in found
    ]


def test_what_was_begun_goes_on_first_and_is_one_response() -> None:
    engine = SteppedEngine(lambda prompt, index: 5)
    step = Step(engine, 6, [carried(1, 0, 3), carried(4, 1, 2)], keeps=True)
    step.run()
    first, second, third, *_ = engine.requests
    assert [(one.group_id, one.sample_index) for one in (first, second, third)] == [(1, 0), (4, 1), (0, 0)]
    assert first.prefix == (1, 1, 1)
    assert first.seed == sample_seed(0, 2, 1, 0), "its random numbers are those of the step that began it"
    assert third.seed == sample_seed(0, STEP, 0, 0)
    whole = next(one for one in step.judged if one.key == SampleKey("s", 1, 0))
    assert [(len(part.token_ids), part.policy_version) for part in whole.segments] == [(3, 2), (5, 0)]
    assert whole.rollout_log_probs.tolist() == [1.0] * 3 + [0.0] * 5
    assert whole.prompt_ids.tolist() == list(PROMPTS[1].token_ids)


def test_what_is_left_is_kept_with_its_tokens() -> None:
    engine = SteppedEngine(lambda prompt, index: 2 if prompt == 0 or (prompt, index) == (1, 1) else 10**7)
    long = [carried(5, 0, 7), carried(5, 1, 1), carried(6, 0, 2), carried(6, 1, 2), carried(7, 0, 9)]
    step = Step(engine, 3, long[:2], keeps=True)
    step.run()
    assert {one.key[1:] for one in step.judged} == {(0, 0), (0, 1), (1, 1)}
    left = outline(step.stream.left)
    assert left == sorted(left)
    begun = {place: (tokens, at, reason) for place, tokens, at, reason in left}
    assert begun[5, 0][0] > 7
    assert begun[5, 0][1:] == (2, "abort")
    assert begun[1, 0][1:] == (STEP, "abort")
    assert step.stream.num_unused_tokens == 0

    full = SteppedEngine(lambda prompt, index: 10**7)
    step = Step(full, 1, long, keeps=True)  # one more than there are slots, which never is asked for

    async def abort_when_full() -> None:
        running = asyncio.ensure_future(step.stream.run())
        await until(lambda: len(full.beside) > 3)
        step.stream.abort()
        await running

    asyncio.run(abort_when_full())
    assert outline(step.stream.left)[-1] == ((7, 0), 9, 2, "abort"), "as it was"
    assert len(step.stream.left) == 5


def test_what_was_about_to_go_on_is_left_as_it_was() -> None:
    """The end comes before the policy is asked for anything."""

    class Hesitating(SingleTurn):
        async def play(self, *prompt_and_more: Any) -> Trajectory:
            await asyncio.Event().wait()
            raise AssertionError("it never comes")

    engine = SteppedEngine(lambda prompt, index: 10**7)
    step = Step(engine, 1, [carried(5, 0, 7)], keeps=True)
    step.stream._environment = Hesitating(step.stream._environment._judge, lambda ids: "")  # type: ignore[attr-defined]

    async def abort_at_once() -> None:
        running = asyncio.ensure_future(step.stream.run())
        await until(lambda: step.stream._tasks)
        step.stream.abort()
        await running

    asyncio.run(abort_at_once())
    assert engine.requests == []
    assert outline(step.stream.left) == [((5, 0), 7, 2, "abort")]


def test_without_keeping_it_is_lost_and_counted() -> None:
    """The control."""
    engine = SteppedEngine(lambda prompt, index: 2 if prompt == 0 else 10**7)
    step = Step(engine, 2)
    step.run()
    assert step.stream.left == []
    assert step.stream.num_unused_tokens > 0


def test_what_is_written_and_not_judged_in_time_is_judged_in_the_next_step() -> None:
    async def never(prompt: Prompt) -> None:
        if prompt.prompt_id == 0:
            await asyncio.Event().wait()

    step = Step(SteppedEngine(lambda prompt, index: 2), 6, judge=never, keeps=True)
    step.run()
    assert outline(step.stream.left)[:2] == [((0, 0), 2, STEP, "stop"), ((0, 1), 2, STEP, "stop")]
    engine = SteppedEngine(lambda prompt, index: 2)
    again = Step(engine, 2, [(PROMPTS[0], one) for one in step.stream.left[:2]], keeps=True)
    again.run()
    assert [one.key for one in again.judged[:2]] == [SampleKey("s", 0, 0), SampleKey("s", 0, 1)]
    assert again.judged[0].accuracy == 1.0
    assert not [one for one in engine.requests if one.group_id == 0], "nothing is written again"


def ends(slowness: int, *, meets: bool) -> tuple[int, list[int], list[Any]]:
    """(decoding steps, how many were judged at each meeting, what was left) with verdicts that take some time."""

    async def late(prompt: Prompt) -> None:
        for _ in range(slowness * (prompt.prompt_id % 3)):
            await asyncio.sleep(0.002)

    engine = StoppableSteppedEngine(lambda prompt, index: 3 + (7 * prompt + 3 * index) % 11)
    step = Step(engine, 9, [carried(2, 1, 2)], judge=late, keeps=True, meets=meets)
    step.run()
    assert not engine.is_at_rest, "it may decode as it likes again"
    return len(engine.beside), step.at_meetings if meets else [], outline(step.stream.left)


def test_a_stream_that_meets_ends_at_a_step_that_time_does_not_move() -> None:
    at_once, later = ends(0, meets=True), ends(4, meets=True)
    assert at_once == later
    num_steps, at_meetings, left = at_once
    assert num_steps == 2 * STRETCH_STEPS
    assert at_meetings[0] < 9 <= at_meetings[1]
    assert len(left) == 4, "as many as there are slots"


def test_a_stream_that_does_not_meet_ends_when_it_is_told() -> None:
    """The control."""
    assert ends(0, meets=False) != ends(4, meets=False)


def test_a_rank_without_work_comes_to_meetings_all_the_same() -> None:
    """One rank's responses take five stretches; the other has none left after the first step."""
    first, second = works(2, 4, is_dealt=True)
    lengths = {0: 5 * STRETCH_STEPS - 2, 1: 1}
    engines = [StoppableSteppedEngine(lambda prompt, index: lengths[index]) for _ in range(2)]
    steps = [
        Step(engine, 4, work=work, keeps=True, meets=True)
        for engine, work in zip(engines, (first, second), strict=True)
    ]

    async def both() -> None:
        await asyncio.wait_for(asyncio.gather(*(step.stream.run() for step in steps)), 60)

    asyncio.run(both())
    assert [len(engine.beside) for engine in engines] == [lengths[0], lengths[1]]
    assert steps[0].at_meetings == [0, 0, 0, 0, 2]
    assert steps[1].at_meetings == [], "rank 0 alone decides"
    assert [one.stream.left for one in steps] == [[], []]


@pytest.mark.parametrize("aborts", [0, 1])
def test_an_abort_on_one_rank_ends_the_other_at_its_meeting(aborts: int) -> None:
    both_works = works(2, 8, is_dealt=True)
    engines = [StoppableSteppedEngine(lambda prompt, index: 10**6) for _ in range(2)]
    steps = [
        Step(engine, 8, work=work, keeps=True, meets=True) for engine, work in zip(engines, both_works, strict=True)
    ]

    async def both() -> None:
        running = [asyncio.ensure_future(step.stream.run()) for step in steps]
        await until(lambda: all(len(engine.beside) > 2 * STRETCH_STEPS for engine in engines))
        steps[aborts].stream.abort()
        await asyncio.wait_for(asyncio.gather(*running), 60)

    asyncio.run(both())
    assert all(work.is_over for work in both_works)
    assert all(not engine._running for engine in engines)


def test_a_broken_engine_ends_a_stream_that_meets() -> None:
    engine = StoppableSteppedEngine(lambda prompt, index: 3)
    engine._fail = "3/s/2/1"
    with pytest.raises(RuntimeError, match="the engine broke"):
        Step(engine, 100, keeps=True, meets=True).run()


def test_a_request_that_goes_on_says_so() -> None:
    requests: list[GenerationRequest] = []

    class Noting(SteppedEngine):
        async def generate(self, request: GenerationRequest) -> Turn:
            requests.append(request)
            return await super().generate(request)

    Step(Noting(lambda prompt, index: 1), 1, [carried(3, 0, 4)], keeps=True).run()
    assert requests[0].sample_id == f"{STEP}/s/3/0"
