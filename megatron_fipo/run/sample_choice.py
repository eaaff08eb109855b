"""Chooses the responses of a training step that are kept for people to read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_fipo.config import SamplingSection
from megatron_fipo.rl.advantages import is_correct
from megatron_fipo.rl.trajectory import Group, Trajectory
from megatron_fipo.run.samples import TrainingSample

MAX_REFERENCE_CHARACTERS = 10_000
"""A longer reference, such as a program's tests, is cut."""


def samples_of_step(
    step: int,
    trained_on: Sequence[Group],
    generated: Sequence[Group],
    count: int,
    config: SamplingSection,
    decode: Callable[[list[int]], str],
) -> list[TrainingSample]:
    """Choose responses to keep: the same for the same groups, and various.

    Each is of another group, as long as there are enough. One in four is of a group that was generated and not trained
    on, where there is one; the others are of groups that were, the first of each source before the second of any. Of
    the first group the first right response is taken, of the second the first wrong one, and so on in turn.

    Args:
        trained_on: the step's groups, with rewards and advantages.
        generated: all groups that the step generated.
        count: how many responses to keep, at most.
        decode: text of a response's tokens; where samples come from other ranks, they have none.
    """
    taken = {(group.prompt.source, group.prompt.prompt_id) for group in trained_on}
    others = [group for group in generated if (group.prompt.source, group.prompt.prompt_id) not in taken]
    num_others = min(count // 4, len(others))
    num_taken = min(count - num_others, len(trained_on))
    num_others = min(count - num_taken, len(others))
    chosen = [*_various(trained_on)[:num_taken], *_various(others)[:num_others]]
    samples = []
    for turn, group in enumerate(chosen):
        in_training = (group.prompt.source, group.prompt.prompt_id) in taken
        why_not = "" if in_training else _why_not(group, config)
        samples.append(_kept(step, group, _pick(group, right=turn % 2 == 0), why_not, decode))
    return samples


def _various(groups: Sequence[Group]) -> list[Group]:
    """The groups in their order, except that the first of each source comes before the second of any."""
    seen: dict[str, int] = {}
    keyed = []
    for position, group in enumerate(groups):
        seen[group.prompt.source] = seen.get(group.prompt.source, 0) + 1
        keyed.append((seen[group.prompt.source], position, group))
    return [group for _, _, group in sorted(keyed, key=lambda item: item[:2])]


def _pick(group: Group, *, right: bool) -> Trajectory:
    """The group's first response of the wanted kind, or its first one."""
    return next((sample for sample in group.samples if is_correct(sample) is right), group.samples[0])


def _why_not(group: Group, config: SamplingSection) -> str:
    """Why a group that was generated in this step is not in its batch."""
    if errors := [sample.error for sample in group.samples if sample.error]:
        return f"dropped: one of its responses could not be judged ({errors[0]})"
    num_correct = sum(is_correct(sample) for sample in group.samples)
    if config.dynamic and num_correct in (0, len(group.samples)):
        return f"dropped: all of its {len(group.samples)} responses are {'right' if num_correct else 'wrong'}"
    if config.max_surplus_age_steps:
        return "left over: the batch was full; kept for the next step"
    return "dropped: the batch was full"


def _kept(
    step: int, group: Group, sample: Trajectory, why_not: str, decode: Callable[[list[int]], str]
) -> TrainingSample:
    reference = str(group.prompt.reference)
    if len(reference) > MAX_REFERENCE_CHARACTERS:
        reference = f"{reference[:MAX_REFERENCE_CHARACTERS]} … ({len(reference)} characters)"
    return TrainingSample(
        step=step,
        source=group.prompt.source,
        prompt_id=group.prompt.prompt_id,
        sample_index=sample.sample_index,
        prompt=group.prompt.text,
        response=sample.response_text or decode(sample.response_ids.tolist()),
        reference=reference,
        answer=sample.answer,
        score=float(sample.accuracy),
        reward=float(sample.reward),
        advantage=None if why_not else float(sample.advantage),
        trained_on=not why_not,
        why_not=why_not,
        tokens=sample.num_response_tokens,
        finish_reason=sample.finish_reason,
        error=sample.error,
        created_at_step=group.created_at_step,
    )
