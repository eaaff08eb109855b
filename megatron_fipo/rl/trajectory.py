"""What a step of rollouts consists of: prompts, responses and the groups that they form."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A question, ready for the rollout engine."""

    prompt_id: int
    """Position in the endless, deterministic order of the training data; unique within a run."""
    source: str
    """Name of the data source."""
    text: str
    """The text that was tokenized."""
    token_ids: tuple[int, ...]
    """Prompt tokens, template included."""
    verifier: str
    """Name of the verifier that judges its responses."""
    reference: Any
    """What the verifier compares with: an answer string, or a task entry; must be picklable."""
    row: dict[str, Any] | None = None
    """The data's row, on its way to a verifier that asks for it; None for all others, and once it is judged."""


@dataclass
class Sample:
    """One response."""

    prompt_id: int
    sample_index: int
    """Position within the group, 0 … num_samples_per_prompt - 1."""
    prompt_ids: Tensor
    """int64 [P]."""
    response_ids: Tensor
    """int64 [R], the end-of-sequence token included where it was sampled."""
    rollout_log_probs: Tensor
    """float32 [R], log-probs of the response under the engine's policy at its temperature, before top-p."""
    finish_reason: str
    """stop, length or abort."""
    policy_versions: list[tuple[int, int, int]] = field(default_factory=list)
    """(policy_version, first token, one past the last) spans over the response."""
    response_text: str = ""
    accuracy: float = 0.0
    """Verifier's score in [0, 1]; 1 is correct."""
    answer: str = ""
    """Final answer as the verifier extracted it; empty if none. cons@k votes on it."""
    reward: float = 0.0
    """After shaping."""
    advantage: float = 0.0
    error: str = ""
    """Why the verifier could not judge it; the whole group is dropped then."""
    parts: dict[str, float] = field(default_factory=dict)
    """Scores of several verifiers, and other numbers of the verdict, by name; metrics show their means."""

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens together."""
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def truncated(self) -> bool:
        """Whether the response was cut at the length limit."""
        return self.finish_reason == "length"


@dataclass
class Group:
    """All responses to one prompt, in order of sample_index."""

    prompt: Prompt
    samples: list[Sample]
    created_at_step: int = 0

    @property
    def rewards(self) -> Tensor:
        """float32 [num_samples]."""
        return torch.tensor([sample.reward for sample in self.samples])
