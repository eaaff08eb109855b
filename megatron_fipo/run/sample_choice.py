"""Chooses the responses of a training step that are kept for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_fipo.config import SamplingSection
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.rollout.held import Held
from megatron_fipo.run.samples import TrainingSample

MAX_REFERENCE_CHARACTERS = 10_000
"""A longer reference, such as a program's tests, is cut."""


@dataclass(frozen=True)
class Chosen:
    """A response that is kept: where it is, and what the rank that holds it does not know of it.

    Attributes:
        leader: the rank that holds it, counted among those that generate.
        advantage: None where it was not trained on.
        why_not: why it was not; empty where it was.
    """

    leader: int
    prompt_id: int
    sample_index: int
    reward: float
    advantage: float | None
    why_not: str


def choose(
    trained_on: Sequence[JudgedGroup], generated: Sequence[JudgedGroup], count: int, config: SamplingSection
) -> list[Chosen]:
    """Choose responses to keep: the same for the same groups, and various.

    Each is of another group, as long as there are enough. One in four is of a group that was generated and not trained
    on, where there is one; the others are of groups that were, the first of each source before the second of any. Of
    the first group the first right response is taken, of the second the first wrong one, and so on in turn.

    Args:
        trained_on: the step's groups, with rewards and advantages.
        generated: all groups that the step generated, with rewards.
        count: how many responses to keep, at most.
    """
    taken = {(group.source, group.prompt_id) for group in trained_on}
    others = [group for group in generated if (group.source, group.prompt_id) not in taken]
    num_others = min(count // 4, len(others))
    num_taken = min(count - num_others, len(trained_on))
    num_others = min(count - num_taken, len(others))
    groups = [*_various(trained_on)[:num_taken], *_various(others)[:num_others]]
    chosen = []
    for turn, group in enumerate(groups):
        place = _pick(group, right=turn % 2 == 0)
        row = group.rows[place]
        in_training = (group.source, group.prompt_id) in taken
        assert group.rewards is not None, "assign_rewards comes first"
        chosen.append(
            Chosen(
                leader=int(row["leader"]),
                prompt_id=group.prompt_id,
                sample_index=int(row["sample_index"]),
                reward=float(group.rewards[place]),
                advantage=float(group.advantages[place]) if in_training and group.advantages is not None else None,
                why_not="" if in_training else _why_not(group, config),
            )
        )
    return chosen


def _various(groups: Sequence[JudgedGroup]) -> list[JudgedGroup]:
    """The groups in their order, except that the first of each source comes before the second of any."""
    seen: dict[str, int] = {}
    keyed = []
    for position, group in enumerate(groups):
        seen[group.source] = seen.get(group.source, 0) + 1
        keyed.append((seen[group.source], position, group))
    return [group for _, _, group in sorted(keyed, key=lambda item: item[:2])]


def _pick(group: JudgedGroup, *, right: bool) -> int:
    """The place of the group's first response of the wanted kind, or of its first one."""
    return int((group.is_right == right).argmax())


def _why_not(group: JudgedGroup, config: SamplingSection) -> str:
    """Why a group that was generated in this step is not in its batch."""
    if group.errors:
        return f"dropped: one of its responses could not be judged ({next(iter(group.errors.values()))})"
    num_correct = int(group.is_right.sum())
    if config.dynamic and num_correct in (0, len(group.rows)):
        return f"dropped: all of its {len(group.rows)} responses are {'right' if num_correct else 'wrong'}"
    if config.max_surplus_age_steps:
        return "left over: the batch was full; kept for the next step"
    return "dropped: the batch was full"


def kept(step: int, chosen: Chosen, held: Held, decode: Callable[[list[int]], str]) -> TrainingSample:
    """A chosen response in full, made where it is held.

    Args:
        held: what this rank holds, the chosen response among it.
        decode: text of a response's tokens.
    """
    sample, prompt = held.samples[chosen.prompt_id, chosen.sample_index], held.prompts[chosen.prompt_id]
    return TrainingSample(
        step=step,
        source=prompt.source,
        prompt_id=prompt.prompt_id,
        sample_index=sample.sample_index,
        prompt=prompt.text,
        response=sample.response_text or decode(sample.response_ids.tolist()),
        reference=shown_reference(prompt),
        answer=sample.answer,
        score=float(sample.accuracy),
        reward=chosen.reward,
        advantage=chosen.advantage,
        trained_on=not chosen.why_not,
        why_not=chosen.why_not,
        tokens=sample.num_response_tokens,
        finish_reason=sample.finish_reason,
        error=sample.error,
        created_at_step=held.created_at_step[chosen.prompt_id],
    )


def shown_reference(prompt: Prompt) -> str:
    """What a prompt's responses are compared with, as text; cut where it is long."""
    reference = str(prompt.reference)
    if len(reference) <= MAX_REFERENCE_CHARACTERS:
        return reference
    return f"{reference[:MAX_REFERENCE_CHARACTERS]} … ({len(reference)} characters)"
