"""Groups out of prompts, over an engine whose responses finish in whatever order a test wants."""

from __future__ import annotations

import asyncio

import pytest
import torch

from megatron_fipo.environments.environment import ABORTED
from megatron_fipo.environments.single_turn import SingleTurn
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.rl.trajectory import Group, Prompt, Segment, Trajectory
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import GenerationRequest, Policy, SamplingParams, Share, Turn, sample_seed
from megatron_fipo.verifiers.verdict import Verdict

PROMPTS = [Prompt(i, "s", f"q{i}", (10 + i,), "exact", f"{i}") for i in range(3)]
SAMPLING = SamplingParams(max_tokens=4, temperature=0.5, top_p=0.9)


class FakeEngine:
    """Answers once all requests are there, last first. Response: (100 * prompt + sample) as one token."""

    def __init__(self, num_expected: int, fail: str = "", abort: str = "") -> None:
        self.requests: list[GenerationRequest] = []
        self.num_cancelled = 0
        self.num_running = 0
        self._num_expected, self._fail, self._abort = num_expected, fail, abort
        self._turn = asyncio.Condition()
        self._num_answered = 0

    async def generate(self, request: GenerationRequest) -> Turn:
        position = len(self.requests)
        self.requests.append(request)
        self.num_running += 1
        try:
            async with self._turn:
                self._turn.notify_all()
                await self._turn.wait_for(
                    lambda: (
                        len(self.requests) == self._num_expected
                        and self._num_answered == self._num_expected - 1 - position
                    )
                )
                self._num_answered += 1
                self._turn.notify_all()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1
        if request.sample_id == self._fail:
            raise RuntimeError("the engine broke")
        token = torch.tensor([100 * request.group_id + request.sample_index])
        reason = "abort" if request.sample_id == self._abort else "stop"
        return Turn(request, [Segment(token, "policy", torch.zeros(1), 0)], reason)

    share: Share | None = None
    capacity = 64
    repeatable = False

    def start(self, policy: Policy | None) -> None:
        raise NotImplementedError

    def give(self, policy: Policy, version: int) -> None:
        raise NotImplementedError

    def take_back(self, policy: Policy) -> None:
        raise NotImplementedError

    def forget_load(self) -> None:
        raise NotImplementedError

    def metrics(self) -> Metrics:
        raise NotImplementedError

    def abort(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


async def judge(prompt: Prompt, text: str, finish_reason: str) -> Verdict:
    return Verdict(score=float(text == "<101>"), answer=f"{prompt.reference}:{text}:{finish_reason}")


def collect(engine: FakeEngine, seen: list[Trajectory] | None = None, prompts: list[Prompt] = PROMPTS) -> list[Group]:
    return asyncio.run(
        generate_groups(
            engine,
            prompts,
            SingleTurn(judge, lambda ids: f"<{ids[0]}>"),
            num_samples=2,
            sampling=SAMPLING,
            run_seed=5,
            step=9,
            on_sample=None if seen is None else seen.append,
        )
    )


def test_groups_come_in_prompt_order_whatever_finished_first() -> None:
    engine, seen = FakeEngine(6), list[Trajectory]()
    groups = collect(engine, seen)
    assert [group.prompt for group in groups] == PROMPTS
    assert [group.created_at_step for group in groups] == [9, 9, 9]
    assert [[s.sample_index for s in group.samples] for group in groups] == [[0, 1]] * 3
    assert [(s.prompt_id, s.sample_index) for s in seen] == [(2, 1), (2, 0), (1, 1), (1, 0), (0, 1), (0, 0)]
    assert [s.accuracy for group in groups for s in group.samples] == [0, 0, 0, 1, 0, 0]
    assert groups[1].samples[1].answer == "1:<101>:stop"
    assert groups[1].samples[1].response_text == "<101>"


def test_requests_carry_prompt_sampling_and_their_own_seed() -> None:
    engine = FakeEngine(6)
    collect(engine)
    assert {(r.group_id, r.sample_index): r.seed for r in engine.requests} == {
        (p, s): sample_seed(5, 9, p, s) for p in range(3) for s in range(2)
    }
    assert len({r.seed for r in engine.requests}) == len({r.sample_id for r in engine.requests}) == 6
    assert all(r.sampling == SAMPLING and r.prompt_ids == (10 + r.group_id,) for r in engine.requests)


def test_an_engine_error_is_raised_as_it_is_and_nothing_goes_on() -> None:
    engine = FakeEngine(6, fail="9/s/1/1")
    with pytest.raises(RuntimeError, match="the engine broke"):
        collect(engine)
    # 2/1 and 2/0 were answered, 1/1 failed; 1/0, whose turn it was next, may have answered before it was cancelled.
    assert engine.num_cancelled >= 1
    assert engine.num_running == 0


def test_an_aborted_response_is_not_judged_and_spoils_its_group() -> None:
    groups = collect(FakeEngine(6, abort="9/s/1/1"))
    sample = groups[1].samples[1]
    assert (sample.error, sample.accuracy, sample.answer) == (ABORTED, 0.0, "")
    assert not any(s.error for group in (groups[0], groups[2]) for s in group.samples)


def test_the_same_prompt_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="same source and prompt_id"):
        collect(FakeEngine(4), prompts=[PROMPTS[0], PROMPTS[0]])
