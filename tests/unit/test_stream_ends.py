"""How a rank's stream ends: who is left without work, and who is waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from megatron_fipo.environments.environment import ABORTED, Speak
from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Segment, Trajectory
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, Turn
from megatron_fipo.rollout.stream import Stream
from tests.unit.server_world import World

PATIENCE_S = 60.0


class PlayedEngine:
    """An engine that writes a response when it is told to, or when it is told to abort."""

    repeatable = False

    def __init__(self, capacity: int = 1000) -> None:
        self.capacity = capacity
        self.in_flight: dict[str, tuple[GenerationRequest, asyncio.Future[Turn]]] = {}
        self.reason_at_abort = "abort"

    async def generate(self, request: GenerationRequest) -> Turn:
        answer: asyncio.Future[Turn] = asyncio.get_running_loop().create_future()
        self.in_flight[request.sample_id] = request, answer
        return await answer

    def finish(self, number: int, reason: str = "stop") -> None:
        """So many responses, the oldest first, are written."""
        for sample_id in list(self.in_flight)[:number]:
            request, answer = self.in_flight.pop(sample_id)
            answer.set_result(Turn(request, [Segment(torch.tensor([1]), log_probs=torch.zeros(1))], reason))

    def abort(self) -> None:
        self.finish(len(self.in_flight), self.reason_at_abort)


class PlayedEnvironment:
    """One turn, which is judged when `may_judge` is set."""

    def __init__(self) -> None:
        self.may_judge = asyncio.Event()
        self.may_judge.set()

    async def play(self, prompt: Prompt, key: SampleKey, speak: Speak) -> Trajectory:
        turn = await speak(())
        trajectory = Trajectory(key, torch.tensor([5]), turn.segments, turn.finish_reason)
        if turn.finish_reason == "abort":
            trajectory.error = ABORTED
            return trajectory
        await self.may_judge.wait()
        return trajectory


def key_of(ticket: int) -> tuple[Prompt, SampleKey]:
    prompt = Prompt(ticket // 8, "sums", "", (5, 6), "chain_arithmetic", "1")
    return prompt, SampleKey("sums", prompt.prompt_id, ticket % 8)


def stream_of(
    engine: Any, work: OrderedWork, environment: Any = None, on_judged: Callable[..., None] = lambda *judged: None
) -> Stream:
    return Stream(
        engine,
        environment or PlayedEnvironment(),
        work,
        sampling=SamplingParams(100),
        run_seed=0,
        step=1,
        key_of=key_of,
        recorded=lambda prompt, key: None,
        on_written=lambda sample: None,
        on_judged=on_judged,
        look=lambda: None,
    )


def works(num_workers: int, num_tickets: int, *, is_dealt: bool = False) -> list[OrderedWork]:
    """The same work as each rank sees it."""
    store = HashStore()
    found = [
        OrderedWork(worker, num_workers, num_tickets, is_dealt=is_dealt, store=store) for worker in range(num_workers)
    ]
    for work in found:
        work._prefix = found[0]._prefix
    return found


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():
            await asyncio.sleep(0.001)


# --- who has work -----------------------------------------------------------------------------------------------------


def test_whoever_comes_first_leaves_the_others_their_share() -> None:
    """Each engine has room for everything; the second rank comes when the first has begun."""

    async def run() -> None:
        first, second = works(2, 32)
        engines = PlayedEngine(), PlayedEngine()

        def judged(work: OrderedWork) -> Callable[..., None]:
            return lambda prompt, sample: work.tell(b"one")

        one = asyncio.ensure_future(stream_of(engines[0], first, on_judged=judged(first)).run())
        await until(lambda: engines[0].in_flight)
        assert len(engines[0].in_flight) == 16
        two = asyncio.ensure_future(stream_of(engines[1], second, on_judged=judged(second)).run())
        await until(lambda: engines[1].in_flight)
        assert len(engines[1].in_flight) == 16
        engines[1].finish(12)  # it is the faster one
        heard: list[bytes] = []
        await until(lambda: heard.extend(first.told()) or len(heard) == 12)
        first.extend(48)  # 36 of them are not done
        await until(lambda: sum(len(engine.in_flight) for engine in engines) == 36)
        assert [len(engine.in_flight) for engine in engines] == [18, 18]
        first.end()
        await asyncio.gather(one, two)

    asyncio.run(run())


def test_dealt_work_has_no_share() -> None:
    """Which responses are decoded side by side must not depend on when a rank hears of more."""
    first, _ = works(2, 33, is_dealt=True)
    assert first.fair_share is None
    (alone,) = works(1, 33)
    assert alone.fair_share is None


# --- who is waited for ------------------------------------------------------------------------------------------------


def test_the_verdict_of_a_response_that_ends_by_itself_when_all_is_aborted_is_not_waited_for() -> None:
    async def run() -> Stream:
        (work,) = works(1, 4)
        engine, environment = PlayedEngine(), PlayedEnvironment()
        environment.may_judge.clear()
        engine.reason_at_abort = "stop"
        stream = stream_of(engine, work, environment)
        running = asyncio.ensure_future(stream.run())
        await until(lambda: len(engine.in_flight) == 4)
        work.end()
        await asyncio.wait_for(running, PATIENCE_S)
        return stream

    stream = asyncio.run(run())
    assert stream.num_unused_tokens == 4


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_a_request_that_is_on_its_way_when_all_is_aborted_ends_too(world: World) -> None:
    """Its server hears of it when the others have ended; nothing is left there that nobody waits for."""
    engine, environment = world.engine(world.pool(), max_concurrent_requests=3), PlayedEnvironment()
    engine.start()
    environment.may_judge.clear()
    (work,) = works(1, 6)

    def num_running() -> int:
        return sum(len(machine.running) for machine in world.machines.values())

    def judged(prompt: Prompt, sample: Trajectory) -> None:
        assert (len(world.generated_at()), num_running()) == (4, 2), "the fourth is on its way"
        work.end()

    running = world.begin(stream_of(engine, work, environment, judged).run())
    world.until(lambda: num_running() == 3)
    for server in (0, 1):
        world.trips[server, "generate"] = 3.0
    machine = next(machine for machine in world.machines.values() if machine.running)
    machine.finish(next(iter(machine.running)), "stop")
    world.until(lambda: len(world.generated_at()) == 4)
    environment.may_judge.set()
    world.run(running, 10.0)
    assert num_running() == 0
    engine.close()
    world.expect_sound()
