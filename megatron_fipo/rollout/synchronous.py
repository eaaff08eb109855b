"""The synchronous source: a step's responses are generated when the step asks for them, by the policy of this step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from megatron_fipo.config import Config
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import decided_by_leader, on_every_rank
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.advantages import assign_advantages, assign_rewards
from megatron_fipo.rl.dynamic_sampling import BatchNotFilledError, DynamicSampler
from megatron_fipo.rl.judged import failures_by_kind, graded_scores
from megatron_fipo.rl.judged_group import JudgedGroup, plan_of
from megatron_fipo.rl.trajectory import Group
from megatron_fipo.rollout.engine import NO_PLACES, RolloutEngine, SamplingParams
from megatron_fipo.rollout.generation import GroupGenerator
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.source import JudgedStep, Listener, PromptOrder, StepRollouts
from megatron_fipo.system.disk import DiskError


@dataclass(frozen=True)
class _Decision:
    """What rank 0 tells all ranks of a step: what it trains on, and which other groups are kept, by prompt."""

    plan: NDArray[Any]
    group_sizes: list[int]
    surplus: set[int]


@dataclass(frozen=True)
class _State:
    """A `SourceState`: the position in the order of prompts, and the surplus groups that this rank holds."""

    prompts: dict[str, Any]
    own_surplus: Sequence[Group]
    plane: DataPlane
    ranks: ParallelGroups

    def gathered(self) -> dict[str, Any]:
        """See `SourceState`."""
        own = [group.state_dict() for group in self.own_surplus]
        of_all = sorted(self.plane.gathered(own), key=lambda group: group["prompt"]["prompt_id"])
        return {
            "prompts": self.prompts,
            "sampler": {"surplus": exchange.broadcast_object(of_all, self.ranks.world)},
        }


class SynchronousSource:
    """A `RolloutSource` that generates in rounds until dynamic sampling has a batch.

    Rank 0 keeps the books, of what is known of responses without their tokens. The tokens stay on the ranks that
    generated them.

    Args:
        prompts: the order of training prompts.
        generator: generates groups with `engine`.
        plane: brings to rank 0 what is known of them.
        ledger: records on rank 0 what each step trains on.
        listener: shows progress and failures to judge.
    """

    def __init__(
        self,
        config: Config,
        ranks: ParallelGroups,
        prompts: PromptOrder,
        engine: RolloutEngine,
        generator: GroupGenerator,
        plane: DataPlane,
        ledger: RolloutLedger,
        listener: Listener,
    ) -> None:
        self._config, self._ranks, self._prompts = config, ranks, prompts
        self._engine, self._generator, self._plane = engine, generator, plane
        self._ledger, self._listener = ledger, listener
        self._sampler = DynamicSampler(config.rollout.num_prompts, config.sampling)
        """Of rank 0; those of other ranks see nothing."""
        self._held: dict[int, Group] = {}
        """Groups whose tokens this rank holds, by prompt: what is left over, and the present step's."""
        self._surplus: list[Group] = []
        """Those of them that were left over by the steps before."""
        self.give, self.take_back, self.close = engine.give, engine.take_back, engine.close

    def batch(self, step: int, *, only_recorded: bool = False) -> StepRollouts:
        """See `RolloutSource`."""
        self._held = {group.prompt.prompt_id: group for group in self._surplus}
        self._sampler.start_step(step)
        generated: list[JudgedGroup] = []
        round_index = 0
        while num_prompts := decided_by_leader(self._next_round_size, self._ranks.world):
            own = self._round(step, round_index, num_prompts, only_recorded)
            self._held |= {group.prompt.prompt_id: group for group in own}
            generated += self._add_round(step, own)
            round_index += 1
        for scores in graded_scores(generated):
            self._listener.warning(f"step {step}: {scores}", kind=f"graded scores of {scores.source}")
        trained_on: list[JudgedGroup] = []

        def decide() -> _Decision:
            trained_on.extend(self._sampler.take())
            assign_advantages(trained_on, self._config.advantages.estimator)
            trained_ids = [group.prompt_id for group in trained_on]
            self._ledger.note_plan(step, trained_ids, must_be_same=only_recorded)
            surplus = {group.prompt_id for group in self._sampler.surplus}
            return _Decision(plan_of(trained_on), [len(group.rows) for group in trained_on], surplus)

        told = decided_by_leader(decide, self._ranks.world, (BatchNotFilledError, DiskError, ValueError))
        held = self._held
        self._surplus = [group for prompt_id, group in held.items() if prompt_id in told.surplus]
        judged = JudgedStep(trained_on, generated) if self._ranks.rank == 0 else None
        return StepRollouts(told.plan, told.group_sizes, held, judged)

    def metrics(self) -> Metrics:
        """See `RolloutSource`."""
        of_sampling = decided_by_leader(self._sampler.metrics, self._ranks.world)
        return {**of_sampling, **exchange.merge_metrics(self._engine.metrics(), self._ranks.world)}

    def state(self) -> _State:
        """See `RolloutSource`."""
        return _State(self._prompts.state_dict(), tuple(self._surplus), self._plane, self._ranks)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `RolloutSource`. The surplus is shared out over the ranks that generate now."""
        self._prompts.load_state_dict(state["prompts"])
        surplus = [Group.from_state_dict(group) for group in state["sampler"]["surplus"]]
        num_leaders = self._plane.num_leaders
        judged = [JudgedGroup.of(group, place % num_leaders) for place, group in enumerate(surplus)]
        self._assign_rewards(judged)
        self._sampler.restore(judged)
        leader = self._plane.leader
        self._surplus = [] if leader is None else surplus[leader::num_leaders]

    def _next_round_size(self) -> int:
        """Prompts of the next round; 0 where no further one is needed."""
        rollout, sampler = self._config.rollout, self._sampler
        if not sampler.needs_round:
            return 0
        missing = rollout.num_prompts if sampler.num_rounds == 0 else 2 * sampler.num_missing
        return rollout.num_prompts_per_round or missing

    def _round(self, step: int, round_index: int, num_prompts: int, only_recorded: bool) -> list[Group]:
        """This rank's judged groups of one round."""
        rollout, share = self._config.rollout, self._generator.share
        places = NO_PLACES if share is None else share.places
        prompts = on_every_rank(lambda: self._prompts.take(num_prompts, places), self._ranks.world)
        with self._listener.rollout_progress(step, len(prompts) * rollout.num_samples_per_prompt) as progress:
            return self._generator.generate(
                prompts,
                rollout.num_samples_per_prompt,
                SamplingParams(rollout.max_response_tokens, rollout.temperature, rollout.top_p),
                step,
                on_sample=lambda sample: progress.advance(),
                round_index=round_index,
                only_recorded=only_recorded,
            )

    def _add_round(self, step: int, own: Sequence[Group]) -> list[JudgedGroup]:
        """Enter a round's groups into the books. Returns them on rank 0; [] elsewhere."""
        groups = self._plane.judged(own)
        self._assign_rewards(groups)
        if self._ranks.rank == 0:
            self._sampler.add_round(groups)
        for failure in failures_by_kind(groups):
            self._listener.warning(f"step {step}: {failure}", kind=failure.kind)
        return groups

    def _assign_rewards(self, groups: Sequence[JudgedGroup]) -> None:
        assign_rewards(groups, self._config.reward, self._config.rollout.max_response_tokens)
