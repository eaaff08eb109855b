"""Environments: one turn and a verdict; and that another kind needs nothing but a class of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch

from megatron_fipo.environments.environment import ABORTED, Speak
from megatron_fipo.environments.single_turn import SingleTurn
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Segment, Trajectory
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import GenerationRequest, SamplingParams, Turn
from megatron_fipo.verifiers.verdict import Verdict
from tests.unit.test_collect import FakeEngine

PROMPT = Prompt(4, "sums", "1+1=", (11, 12), "exact", "2")
KEY = SampleKey("sums", 4, 0)


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


def turn(*ids: int, reason: str = "stop", prefix: Sequence[int] = ()) -> Turn:
    request = GenerationRequest("x", 4, 0, (11, 12), SamplingParams(9), 0, prefix=tuple(prefix))
    return Turn(request, [Segment(torch.tensor(ids), "policy", torch.zeros(len(ids)), 6)], reason)


async def judge(prompt: Prompt, text: str, finish_reason: str) -> Verdict:
    return Verdict(0.5, answer=f"{prompt.reference}/{text}/{finish_reason}", parts={"length": 3.0})


def test_a_single_turn_is_decoded_and_judged() -> None:
    async def speak(response_so_far: Sequence[int]) -> Turn:
        assert list(response_so_far) == []
        return turn(5, 6, reason="length")

    played = asyncio.run(SingleTurn(judge, decode).play(PROMPT, KEY, speak))
    assert (played.key, played.response_text, played.finish_reason) == (KEY, "5 6", "length")
    assert (played.accuracy, played.answer, played.parts) == (0.5, "2/5 6/length", {"length": 3.0})
    assert played.policy_versions == [(6, 0, 2)]
    assert played.prompt_ids.tolist() == [11, 12]


def test_what_was_aborted_is_not_judged() -> None:
    async def speak(response_so_far: Sequence[int]) -> Turn:
        return turn(5, reason="abort")

    async def refuse(*arguments: object) -> Verdict:
        raise AssertionError("an unfinished response was judged")

    played = asyncio.run(SingleTurn(refuse, decode).play(PROMPT, KEY, speak))
    assert (played.error, played.response_text, played.accuracy) == (ABORTED, "5", 0.0)


class Calculator:
    """An environment of several turns: whenever the policy writes 7, it is told 70, until it writes 1."""

    async def play(self, prompt: Prompt, key: SampleKey, speak: Speak) -> Trajectory:
        trajectory = Trajectory(key, torch.tensor(prompt.token_ids), [], "stop")
        while True:
            said = await speak(trajectory.response_ids.tolist())
            trajectory.segments += said.segments
            trajectory.finish_reason = said.finish_reason
            if said.response_ids[-1] != 7:
                trajectory.judged(Verdict(1.0, answer=decode(trajectory.response_ids.tolist())))
                return trajectory
            trajectory.segments.append(Segment(torch.tensor([70]), "environment"))


class Speaker(FakeEngine):
    """Writes 7 until it has been told 70 twice, then 1."""

    async def generate(self, request: GenerationRequest) -> Turn:
        self.requests.append(request)
        said = 1 if request.prefix.count(70) == 2 else 7
        return Turn(request, [Segment(torch.tensor([said]), "policy", torch.zeros(1), 0)], "stop")


def test_an_environment_of_several_turns_needs_no_other_code() -> None:
    engine = Speaker(0)
    (group,) = asyncio.run(
        generate_groups(engine, [PROMPT], Calculator(), num_samples=1, sampling=SamplingParams(9), run_seed=0, step=3)
    )
    assert [request.prefix for request in engine.requests] == [(), (7, 70), (7, 70, 7, 70)]
    assert {request.prompt_ids for request in engine.requests} == {(11, 12)}
    (trajectory,) = group.samples
    assert trajectory.answer == "7 70 7 70 1"
    assert trajectory.policy_mask.tolist() == [True, False, True, False, True]
