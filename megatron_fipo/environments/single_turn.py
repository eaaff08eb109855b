"""The environment of a prompt with one answer: the policy speaks once, and a verifier judges it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import torch

from megatron_fipo.config import without_secrets
from megatron_fipo.environments.environment import ABORTED, Speak
from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory
from megatron_fipo.verifiers.combined import judge_combined
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob

Judge: TypeAlias = Callable[[Prompt, str, str], Awaitable[Verdict]]
"""(prompt, response_text, finish_reason) -> Verdict; what cannot be judged comes back as a verdict with an error."""

Decode: TypeAlias = Callable[[list[int]], str]
"""Turns response tokens into the text that is judged, without special tokens."""


class SingleTurn:
    """An `Environment` whose prompts are answered once.

    Args:
        judge: asynchronous; it is not asked about aborted responses.
        decode: turns response tokens into text.
    """

    def __init__(self, judge: Judge, decode: Decode) -> None:
        self._judge, self._decode = judge, decode

    async def play(self, prompt: Prompt, key: SampleKey, speak: Speak) -> Trajectory:
        """See `Environment`."""
        turn = await speak(())
        prompt_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
        trajectory = Trajectory(key, prompt_ids, turn.segments, turn.finish_reason)
        trajectory.response_text = self._decode(trajectory.response_ids.tolist())
        if turn.finish_reason == "abort":
            trajectory.error = ABORTED
            return trajectory
        trajectory.judged(await self._judge(prompt, trajectory.response_text, turn.finish_reason))
        trajectory.error = without_secrets(trajectory.error)  # a reward model's URL may hold one
        return trajectory


def judge_in(verifiers: VerifierPool) -> Judge:
    """A judge that asks the prompt's verifiers in their processes."""

    async def judge(prompt: Prompt, response_text: str, finish_reason: str) -> Verdict:
        job = VerifierJob(prompt.verifier, response_text, prompt.reference, finish_reason, prompt.text, prompt.row)
        return await judge_combined(verifiers, job)

    return judge


def decode_with(tokenizer: Any) -> Decode:
    """A `Decode` that uses a Hugging Face tokenizer."""

    def decode(token_ids: list[int]) -> str:
        return str(tokenizer.decode(token_ids, skip_special_tokens=True))

    return decode
