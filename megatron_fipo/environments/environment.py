"""The interface of an environment: it plays one prompt to its end, whoever asks for it and whatever generates."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

from megatron_fipo.rl.trajectory import Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.engine import Turn

Speak: TypeAlias = Callable[[Sequence[int]], Awaitable[Turn]]
"""speak(response_so_far) -> what the policy writes next; the length limit counts from the response's start."""

ABORTED = "generation was aborted"
"""`Trajectory.error` of a response that the engine ended early: unfinished work, neither right nor wrong."""


class Environment(Protocol):
    """Plays prompts. Training, evaluation in a run and evaluation of a folder all generate through one."""

    async def play(self, prompt: Prompt, key: SampleKey, speak: Speak) -> Trajectory:
        """Let the policy write and answer it, in turns to the end; then judge the whole.

        Returns:
            The judged trajectory; its reward and advantage are not set yet. One that the engine aborted has the error
            `ABORTED`, and is not judged.
        """
        ...
