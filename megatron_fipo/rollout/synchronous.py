"""The synchronous source: a step's responses are generated when the step asks for them, by the policy of this step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_fipo.config import Config
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.rl.advantages import assign_rewards
from megatron_fipo.rl.dynamic_sampling import DynamicSampler
from megatron_fipo.rl.judged import failures_by_kind, graded_scores
from megatron_fipo.rl.trajectory import Group
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams
from megatron_fipo.rollout.generation import GroupGenerator
from megatron_fipo.rollout.source import Listener, PromptOrder, StepRollouts


class SynchronousSource:
    """A `RolloutSource` that generates in rounds until dynamic sampling has a batch.

    Args:
        prompts: the order of training prompts.
        generator: generates groups with `engine`.
        listener: shows progress and failures to judge.
    """

    def __init__(
        self,
        config: Config,
        ranks: ParallelGroups,
        prompts: PromptOrder,
        engine: RolloutEngine,
        generator: GroupGenerator,
        listener: Listener,
    ) -> None:
        self._config, self._ranks, self._prompts = config, ranks, prompts
        self._engine, self._generator, self._listener = engine, generator, listener
        self._sampler = DynamicSampler(config.rollout.num_prompts, config.sampling)
        self.give, self.take_back, self.close = engine.give, engine.take_back, engine.close

    def batch(self, step: int, *, only_recorded: bool = False) -> StepRollouts:
        """See `RolloutSource`."""
        generated: list[Group] = []
        self._sampler.start_step(step)
        while self._sampler.needs_round:
            groups = self._round(step, only_recorded)
            self._sampler.add_round(groups)
            for failure in failures_by_kind(groups):
                self._listener.warning(f"step {step}: {failure}", kind=failure.kind)
            generated += groups
        for scores in graded_scores(generated):
            self._listener.warning(f"step {step}: {scores}", kind=f"graded scores of {scores.source}")
        return StepRollouts(self._sampler.take(), generated)

    def metrics(self) -> Metrics:
        """See `RolloutSource`."""
        return {**self._sampler.metrics(), **merge_metrics(self._engine.metrics(), self._ranks.world)}

    def state_dict(self) -> dict[str, Any]:
        """See `RolloutSource`."""
        return {"prompts": self._prompts.state_dict(), "sampler": self._sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `RolloutSource`."""
        self._prompts.load_state_dict(state["prompts"])
        self._sampler.load_state_dict(state["sampler"])

    def _round(self, step: int, only_recorded: bool) -> list[Group]:
        """The judged groups of one round, rewards assigned."""
        rollout, round_index = self._config.rollout, self._sampler.num_rounds
        prompts = self._prompts.take(self._round_size(is_first=round_index == 0))
        total = len(self._generator.own_share(prompts)) * rollout.num_samples_per_prompt
        with self._listener.rollout_progress(step, total) as progress:
            groups = self._generator.generate(
                prompts,
                rollout.num_samples_per_prompt,
                SamplingParams(rollout.max_response_tokens, rollout.temperature, rollout.top_p),
                step,
                on_sample=lambda sample: progress.advance(),
                round_index=round_index,
                only_recorded=only_recorded,
            )
        assign_rewards(groups, self._config.reward, rollout.max_response_tokens)
        return groups

    def _round_size(self, is_first: bool) -> int:
        rollout = self._config.rollout
        return rollout.num_prompts_per_round or (rollout.num_prompts if is_first else 2 * self._sampler.num_missing)
