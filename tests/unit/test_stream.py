"""One rank's stream: the engine is kept full, what ends early is judged early, and nothing goes on past the end."""

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
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, Turn
from megatron_fipo.rollout.stream import Stream
from megatron_fipo.verifiers.verdict import Verdict
from tests.unit.test_collect import FakeEngine

PROMPTS = [Prompt(number, "s", f"q{number}", (10 + number,), "exact", "1") for number in range(100)]


class SteppedEngine(FakeEngine):
    """Decodes one token a step for each request in a slot; a response's length is its key's."""

    capacity = 4
    num_slots = 4

    def __init__(self, length_of: Callable[[int, int], int]) -> None:
        super().__init__(0)
        self._length_of = length_of
        self._waiting: list[tuple[GenerationRequest, asyncio.Future[Turn]]] = []
        self._running: list[list[Any]] = []
        self.beside: list[list[str]] = []
        """The requests in flight at each step."""
        self.num_aborts = 0
        self._decoding: asyncio.Task[None] | None = None

    async def generate(self, request: GenerationRequest) -> Turn:
        self.requests.append(request)
        if self._fail == request.sample_id:
            raise RuntimeError("the engine broke")
        future: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, future))
        if self._decoding is None or self._decoding.done():
            self._decoding = asyncio.ensure_future(self._decode())
        return await future

    async def _decode(self) -> None:
        while self._waiting or self._running:
            while self._waiting and len(self._running) < self.num_slots:
                self._running.append([*self._waiting.pop(0), 0])
            self.beside.append([request.sample_id for request, _, _ in self._running])
            for entry in [*self._running]:
                entry[2] += 1
                request, future, length = entry
                if length >= self._length_of(request.group_id, request.sample_index):
                    self._running.remove(entry)
                    self._answer(request, future, length, "stop")
            await asyncio.sleep(0)

    def _answer(self, request: GenerationRequest, future: asyncio.Future[Turn], length: int, reason: str) -> None:
        if not future.done():
            tokens = torch.full((length,), request.group_id)
            segments = [Segment(tokens, "policy", torch.zeros(length), 0)] if length else []
            future.set_result(Turn(request, segments, reason))

    def abort(self) -> None:
        self.num_aborts += 1
        for request, future, *length in [*self._running, *self._waiting]:
            self._answer(request, future, length[0] if length else 0, "abort")
        self._running.clear()
        self._waiting.clear()


class Judged:
    """A stream with what is judged, until `num_wanted` responses are."""

    def __init__(
        self,
        engine: SteppedEngine,
        num_wanted: int,
        num_samples: int = 2,
        judge: Callable[[Prompt], Any] | None = None,
        recorded: Callable[[Prompt, SampleKey], Trajectory | None] = lambda prompt, key: None,
        num_tickets: int = 200,
    ) -> None:
        self.engine = engine
        self.keys: list[tuple[int, int]] = []
        self.written: list[Trajectory] = []
        self.work = OrderedWork(0, 1, num_tickets, is_dealt=True, store=HashStore())
        self._num_wanted = num_wanted

        async def right(prompt: Prompt, text: str, reason: str) -> Verdict:
            if judge is not None:
                await judge(prompt)
            return Verdict(1.0)

        self.stream = Stream(
            engine,
            SingleTurn(right, lambda ids: ""),
            self.work,
            sampling=SamplingParams(1000),
            run_seed=0,
            step=3,
            key_of=lambda ticket: self._key(*divmod(ticket, num_samples)),
            recorded=recorded,
            on_written=self.written.append,
            on_judged=self._on_judged,
            look=lambda: None,
        )

    def _key(self, prompt_id: int, sample_index: int) -> tuple[Prompt, SampleKey]:
        return PROMPTS[prompt_id], SampleKey("s", prompt_id, sample_index)

    def _on_judged(self, prompt: Prompt, sample: Trajectory) -> None:
        assert prompt.prompt_id == sample.prompt_id
        self.keys.append((sample.prompt_id, sample.sample_index))
        if len(self.keys) == self._num_wanted:
            self.work.end()
            self.num_steps = len(self.engine.beside)

    def run(self) -> None:
        async def alone() -> None:
            await asyncio.wait_for(self.stream.run(), 60)
            rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            assert [task for task in rest if task is not self.engine._decoding] == [], "nothing goes on past the end"

        asyncio.run(alone())


def test_a_free_slot_gets_the_next_response_in_order() -> None:
    engine = SteppedEngine(lambda prompt, index: 50 if (prompt, index) == (0, 0) else 2)
    judged = Judged(engine, num_wanted=12)
    judged.run()
    assert (0, 0) not in judged.keys, "others go past the long one"
    asked = [(request.group_id, request.sample_index) for request in engine.requests]
    assert asked == [divmod(ticket, 2) for ticket in range(len(asked))]
    assert len(asked) < 12 + 4 + 3, "no more than the engine has room for"
    assert [(one.prompt_id, one.sample_index) for one in judged.written] == judged.keys
    assert judged.stream.num_unused_tokens >= 10, "the long one was begun in vain"


def test_slots_do_not_wait_for_verdicts() -> None:
    """Which responses are decoded side by side is the same whether verdicts come at once or late."""

    def run(judge: Callable[[Prompt], Any] | None) -> list[list[str]]:
        """The requests in flight at each step, until enough were judged."""
        engine = SteppedEngine(lambda prompt, index: 3 + (7 * prompt + 3 * index) % 5)
        judged = Judged(engine, num_wanted=20, judge=judge)
        judged.run()
        return engine.beside[: judged.num_steps]

    async def late(prompt: Prompt) -> None:
        for _ in range(5 * (prompt.prompt_id % 3)):
            await asyncio.sleep(0)

    at_once, later = run(None), run(late)
    common = min(len(at_once), len(later))
    assert common > 10
    assert at_once[:common] == later[:common]


def test_a_slot_that_waited_for_its_verdict_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a stream that begins the next response when one is judged."""
    in_flight = property(lambda self: self._num_begun - len(self._tasks), lambda self, value: None)
    monkeypatch.setattr(Stream, "_num_written", in_flight, raising=False)
    with pytest.raises(AssertionError):
        test_slots_do_not_wait_for_verdicts()


def test_what_is_recorded_is_not_generated_again() -> None:
    known = {(0, 1), (1, 0), (3, 1)}

    def recorded(prompt: Prompt, key: SampleKey) -> Trajectory | None:
        if (key.prompt_id, key.sample_index) not in known:
            return None
        return Trajectory(key, torch.tensor(prompt.token_ids), [], "stop")

    engine = SteppedEngine(lambda prompt, index: 2)
    judged = Judged(engine, num_wanted=8, recorded=recorded)
    judged.run()
    assert known <= {*judged.keys}
    assert len({*judged.keys}) == len(judged.keys)
    assert not known & {(request.group_id, request.sample_index) for request in engine.requests}
    assert not known & {(one.prompt_id, one.sample_index) for one in judged.written}, "they are recorded already"


def test_a_broken_engine_ends_the_stream_with_its_error() -> None:
    engine = SteppedEngine(lambda prompt, index: 3)
    engine._fail = "3/s/2/1"
    with pytest.raises(RuntimeError, match="the engine broke"):
        Judged(engine, num_wanted=100).run()
    assert engine.num_aborts >= 1


def test_a_broken_judge_ends_the_stream_with_its_error() -> None:
    async def broken(prompt: Prompt) -> None:
        if prompt.prompt_id == 3:
            raise KeyError("the judge broke")

    with pytest.raises(KeyError, match="the judge broke"):
        Judged(SteppedEngine(lambda prompt, index: 3), num_wanted=100, judge=broken).run()


@pytest.mark.parametrize("is_told", [True, False])
def test_an_abort_ends_the_work(is_told: bool) -> None:
    """A signal, or a failure elsewhere: nothing new is begun, and all ranks hear of it."""
    engine = SteppedEngine(lambda prompt, index: 2 if prompt < 4 else 10**6)

    async def abort_at_the_third(prompt: Prompt) -> None:
        if prompt.prompt_id == 3:
            while not is_told and len(engine._running) < engine.num_slots:
                await asyncio.sleep(0)  # an engine has to have something in flight for anybody to hear of it
            (judged.stream if is_told else engine).abort()

    judged = Judged(engine, num_wanted=100, judge=abort_at_the_third)
    judged.run()
    assert judged.work.is_over
    assert len(judged.keys) < 10


def test_a_judge_that_never_answers_does_not_hold_up_the_end() -> None:
    async def never(prompt: Prompt) -> None:
        if prompt.prompt_id == 0:
            await asyncio.Event().wait()

    judged = Judged(SteppedEngine(lambda prompt, index: 2), num_wanted=6, judge=never)
    judged.run()
    assert all(prompt_id for prompt_id, _ in judged.keys)
    assert judged.stream.num_unused_tokens >= 4, "both responses to the first prompt"


def test_a_cancelled_stream_begins_nothing_more() -> None:
    """As Ctrl-C cancels it: what is in flight is aborted, and no free place is filled again."""
    engine = SteppedEngine(lambda prompt, index: 3)
    judged = Judged(engine, num_wanted=10**6, num_tickets=10**6)

    async def cancelled() -> int:
        running = asyncio.ensure_future(judged.stream.run())
        while len(engine.beside) < 5:
            await asyncio.sleep(0)
        num_asked = len(engine.requests)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(running), 10)
        return num_asked

    num_asked = asyncio.run(cancelled())
    assert len(engine.requests) <= num_asked + engine.capacity
