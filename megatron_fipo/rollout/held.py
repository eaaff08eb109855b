"""The responses of a step whose tokens a rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory


@dataclass
class Held:
    """Trajectories by prompt and sample. A group's may lie on several ranks, of which each has the prompt."""

    prompts: dict[int, Prompt] = field(default_factory=dict)
    """By prompt_id."""
    created_at_step: dict[int, int] = field(default_factory=dict)
    """By prompt_id."""
    samples: dict[tuple[int, int], Trajectory] = field(default_factory=dict)
    """By prompt_id and sample_index."""

    @classmethod
    def of(cls, groups: Iterable[Group]) -> Held:
        """All responses of these groups."""
        held = cls()
        for group in groups:
            held.add(group)
        return held

    def add(self, group: Group) -> None:
        """Hold a group, or some responses of one."""
        self.prompts[group.prompt.prompt_id] = group.prompt
        self.created_at_step[group.prompt.prompt_id] = group.created_at_step
        for sample in group.samples:
            self.samples[group.prompt.prompt_id, sample.sample_index] = sample

    def forget_from(self, prompt_id: int) -> None:
        """Let go of the responses to prompts from this one on."""
        self.samples = {key: sample for key, sample in self.samples.items() if key[0] < prompt_id}

    def groups(self, prompt_ids: Iterable[int]) -> list[Group]:
        """What is held of some prompts' groups, in the order given; nothing of those that are not held."""
        by_prompt: dict[int, list[Trajectory]] = {}
        for prompt_id, sample_index in sorted(self.samples):
            by_prompt.setdefault(prompt_id, []).append(self.samples[prompt_id, sample_index])
        return [
            Group(self.prompts[prompt_id], by_prompt[prompt_id], self.created_at_step[prompt_id])
            for prompt_id in prompt_ids
            if prompt_id in by_prompt
        ]
