"""Dynamic sampling: which of the judged groups a step trains on, and whether another round of generation is needed.

A group whose members are all right or all wrong carries no signal: its advantages are zero, or come from response
lengths alone. Such groups are dropped and sampling goes on until the batch is full. One rank keeps the books, which
need no token of a response:

    sampler.start_step(step)
    while sampler.needs_round:
        sampler.add_round(generate(next prompts))
    groups = sampler.take()

Source: DAPO, arXiv 2503.14476. Right and wrong are the verifier's, before overlong shaping: otherwise lengths would
make every all-wrong group look mixed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fipo.config import SamplingSection
from megatron_fipo.metrics.reductions import Last, Metrics
from megatron_fipo.rl.judged import failures_by_kind, graded_scores
from megatron_fipo.rl.judged_group import JudgedGroup

NUM_NAMED_KINDS = 3
"""Kinds of failure that the account of a batch that was not filled names."""


class BatchNotFilledError(RuntimeError):
    """The rounds of generation were used up before there were enough groups to train on."""


@dataclass
class _Counts:
    """Counts of what happened to this step's groups."""

    rounds: int = 0
    generated: int = 0
    all_right: int = 0
    all_wrong: int = 0
    failed: int = 0
    unused_tokens: int = 0
    """Of groups that could have been trained on, and are not."""
    expired: int = 0
    """Surplus groups that were too old at the start of the step."""


class DynamicSampler:
    """Collects judged groups over a step's rounds.

    Groups are taken in prompt order, never in order of completion: short answers finish first, and a batch of those
    that happened to be ready would teach brevity.
    """

    def __init__(self, num_groups: int, config: SamplingSection) -> None:
        """
        Args:
            num_groups: groups that a step trains on, > 0.
            config: `dynamic=False` keeps groups without a signal; groups with an error are dropped in any case.
        """
        if num_groups < 1 or config.max_generation_rounds < 1:
            raise ValueError(
                f"rollout.num_prompts={num_groups} and sampling.max_generation_rounds={config.max_generation_rounds} "
                "must be at least 1."
            )
        self._num_groups = num_groups
        self._config = config
        self._step = 0
        self._ready: list[JudgedGroup] = []
        self._judged: list[JudgedGroup] = []
        self._counts = _Counts()
        self._taken_ages: list[int] = []

    def start_step(self, step: int) -> None:
        """Begin a step: surplus groups older than max_surplus_age_steps go, the others open the batch."""
        self._step = step
        self._counts = _Counts()
        self._judged, self._taken_ages = [], []
        oldest = step - self._config.max_surplus_age_steps
        young = [group for group in self._ready if group.created_at_step >= oldest]
        self._counts.expired = len(self._ready) - len(young)
        self._counts.unused_tokens = _num_tokens(self._ready) - _num_tokens(young)
        self._ready = young

    def add_round(self, groups: Sequence[JudgedGroup]) -> None:
        """Judge one round's groups, each complete and in any order."""
        self._counts.rounds += 1
        self._counts.generated += len(groups)
        self._judged += groups
        for group in groups:
            has_failed = not group.judged.all()
            all_right, all_wrong = bool(group.is_right.all()), not group.is_right.any()
            self._counts.failed += has_failed
            self._counts.all_right += all_right and not has_failed
            self._counts.all_wrong += all_wrong and not has_failed
            if self.is_kept(group):
                self._ready.append(group)
        self._ready.sort(key=lambda group: (group.prompt_id, group.source))

    def is_kept(self, group: JudgedGroup) -> bool:
        """Whether a group may be trained on: it could be judged, and has a signal if there must be one."""
        is_uniform = bool(group.is_right.all()) or not group.is_right.any()
        return bool(group.judged.all()) and not (self._config.dynamic and is_uniform)

    @property
    def num_rounds(self) -> int:
        """Rounds that were added this step."""
        return self._counts.rounds

    @property
    def num_missing(self) -> int:
        """Groups that the batch still lacks."""
        return max(self._num_groups - len(self._ready), 0)

    @property
    def full(self) -> bool:
        """Whether there are enough groups for a step."""
        return not self.num_missing

    @property
    def needs_round(self) -> bool:
        """Whether to generate another round: the batch is not full and rounds are left."""
        return not self.full and self._counts.rounds < self._config.max_generation_rounds

    def take(self) -> list[JudgedGroup]:
        """The step's groups in prompt order. What is left over is kept for later steps, or discarded at age 0.

        Returns:
            num_groups groups; fewer, but at least one, where sampling.allow_short_batch lets a short batch pass.

        Raises:
            BatchNotFilledError: if there are not enough, with the numbers of what was dropped and what to do about it.
        """
        if not self._ready or (not self.full and not self._config.allow_short_batch):
            raise BatchNotFilledError(self._diagnosis())
        self._judged = []
        taken, self._ready = self._ready[: self._num_groups], self._ready[self._num_groups :]
        if not self._config.max_surplus_age_steps:
            self._counts.unused_tokens += _num_tokens(self._ready)
            self._ready = []
        self._taken_ages = [self._step - group.created_at_step for group in taken]
        return taken

    def metrics(self) -> Metrics:
        """Return metrics of this step's sampling, the same on every rank; call it after `take`."""
        counts, generated = self._counts, max(self._counts.generated, 1)
        return {
            "rollout/generation_rounds": Last(counts.rounds),
            "rollout/generated_groups": Last(counts.generated),
            "rollout/batch_groups": Last(len(self._taken_ages)),
            "rollout/dropped_groups/all_right_share": Last(counts.all_right / generated),
            "rollout/dropped_groups/all_wrong_share": Last(counts.all_wrong / generated),
            "rollout/dropped_groups/failed_share": Last(counts.failed / generated),
            "rollout/unused_tokens": Last(counts.unused_tokens),
            "rollout/surplus_groups/kept": Last(len(self._ready)),
            "rollout/surplus_groups/expired": Last(counts.expired),
            "rollout/group_age_steps/mean": Last(sum(self._taken_ages) / max(len(self._taken_ages), 1)),
            "rollout/group_age_steps/max": Last(max(self._taken_ages, default=0)),
        }

    @property
    def surplus(self) -> list[JudgedGroup]:
        """After `take`, the groups that are kept for later steps."""
        return list(self._ready)

    def restore(self, surplus: Sequence[JudgedGroup]) -> None:
        """Take over the surplus of a checkpoint; ages count on from the steps in which the groups were made."""
        self._ready = list(surplus)

    def _diagnosis(self) -> str:
        counts = self._counts
        limit = f"sampling.max_generation_rounds={self._config.max_generation_rounds}"
        after = f"{counts.rounds} rounds of generation ({limit})"
        if self._config.streaming:
            after = f"{counts.generated} prompts, all that a step may use ({limit} times those of a round)"
        lines = [
            f"step {self._step}: {len(self._ready)} of {self._num_groups} groups after {after}. Of {counts.generated} "
            f"generated groups {counts.all_right} were all right, {counts.all_wrong} all wrong, {counts.failed} failed "
            "in generation or verification."
        ]
        failures = failures_by_kind(self._judged)
        lines += [f"  failed: {failure.told()}" for failure in failures[:NUM_NAMED_KINDS]]
        if others := failures[NUM_NAMED_KINDS:]:
            num_groups = sum(failure.count for failure in others)
            lines.append(f"  failed: {num_groups} more groups, for {len(others)} other kinds of reason")
        lines += [f"  graded: {scores}" for scores in graded_scores(self._judged)]
        lines.append(f"Remedy: {self._remedy()}")
        return "\n".join(lines)

    def _remedy(self) -> str:
        counts = self._counts
        if counts.failed and counts.failed >= max(counts.all_right, counts.all_wrong):
            return "see the failures above; a larger verifier.timeout_s helps where they are time-outs."
        if counts.all_wrong > counts.all_right and graded_scores(self._judged):
            return (
                "have the verifier return 1 for what is to count as right, such as float(score > 0.5): only 1 is "
                "rewarded as right. If 1 is what you mean, the prompts are too hard for this model: easier data, or "
                "more rollout.num_samples_per_prompt."
            )
        if counts.all_wrong > counts.all_right:
            return (
                "the prompts are too hard for this model: easier data, more rollout.num_samples_per_prompt, a larger "
                "rollout.max_response_tokens if responses are cut; check the prompt template and the verifier on a few "
                "responses. sampling.allow_short_batch=true trains on what there is."
            )
        if counts.all_right:
            return (
                "the prompts are too easy for this model: harder data, or more rollout.num_samples_per_prompt. "
                "sampling.allow_short_batch=true trains on what there is."
            )
        return "generate more prompts in a round, or raise sampling.max_generation_rounds."


def _num_tokens(groups: Sequence[JudgedGroup]) -> int:
    return sum(int(group.rows["num_tokens"].sum()) for group in groups)
