"""What sources have in common whose rank 0 decides a step's batch by what it knows of all judged responses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from numpy.typing import NDArray

from megatron_fipo.config import Config
from megatron_fipo.metrics.reductions import Metrics
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import decided_by_leader, on_leader
from megatron_fipo.parallel.data_plane import DataPlane
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.rl.advantages import assign_advantages, assign_rewards
from megatron_fipo.rl.dynamic_sampling import BatchNotFilledError, DynamicSampler
from megatron_fipo.rl.judged import failures_by_kind, graded_scores
from megatron_fipo.rl.judged_group import JudgedGroup, plan_of
from megatron_fipo.rl.staleness import staleness_metrics
from megatron_fipo.rl.trajectory import Group
from megatron_fipo.rollout.engine import Policy, RolloutEngine, SamplingParams
from megatron_fipo.rollout.generation import GroupGenerator
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.ledger import Plan, RolloutLedger
from megatron_fipo.rollout.source import JudgedStep, Listener, PromptOrder, SourceState, StepRollouts
from megatron_fipo.system.disk import DiskError


@dataclass(frozen=True)
class SourceParts:
    """What a source is made of.

    Attributes:
        prompts: the order of training prompts.
        engine: generates.
        generator: plays prompts on `engine` and has them judged.
        plane: brings to rank 0 what is known of responses.
        ledger: records responses, and on rank 0 what each step trains on.
        listener: shows progress and failures to judge.
    """

    config: Config
    ranks: ParallelGroups
    prompts: PromptOrder
    engine: RolloutEngine
    generator: GroupGenerator
    plane: DataPlane
    ledger: RolloutLedger
    listener: Listener


@dataclass(frozen=True)
class _Decision:
    """What rank 0 tells all ranks of a step: what it trains on, and which other groups are kept, by prompt."""

    plan: NDArray[Any]
    group_sizes: list[int]
    surplus: set[int]
    noted: Plan


@dataclass(frozen=True)
class _State:
    """A `SourceState`: the position in the order of prompts, and the surplus groups that this rank holds."""

    prompts: dict[str, Any]
    own_surplus: Sequence[Group]
    plane: DataPlane

    def gathered(self) -> dict[str, Any]:
        """See `SourceState`."""
        own = [group.state_dict() for group in self.own_surplus]
        of_all = sorted(self.plane.gathered(own), key=lambda group: group["prompt"]["prompt_id"])
        return {
            "prompts": self.prompts,
            "sampler": {"surplus": exchange.broadcast_object(of_all, self.plane.world)},
        }


class BatchSource(ABC):
    """A `RolloutSource` that generates until dynamic sampling has a batch.

    Rank 0 keeps the books, of what is known of responses without their tokens. The tokens stay on the ranks that
    generated them.
    """

    def __init__(self, parts: SourceParts) -> None:
        self.parts = parts
        self.rollout, self.world = parts.config.rollout, parts.ranks.world
        self.sampler = DynamicSampler(parts.config.rollout.num_prompts, parts.config.sampling)
        """Of rank 0; those of other ranks see nothing."""
        self.held = Held()
        """What is left over, and the present step's."""
        self._surplus: list[Group] = []
        """Groups that were left over by the steps before."""
        self._own_metrics: Metrics = {}
        """This rank's part of the metrics of the step's batch."""
        self.take_back = parts.engine.take_back

    @abstractmethod
    def generate(self, step: int, *, only_recorded: bool) -> list[JudgedGroup]:
        """Generate what the step needs; what this rank has of it goes into `held`. Collective.

        Returns:
            All groups whose responses count, in prompt order, on rank 0, where they are in the sampler; [] elsewhere.
        """

    @property
    @abstractmethod
    def next_prompt(self) -> int:
        """On rank 0, after `generate`: the first prompt of the next step."""

    def give(self, policy: Policy, version: int) -> None:
        """See `RolloutSource`."""
        self.parts.engine.give(policy, version)
        self.parts.generator.begin_with(version)

    def close(self) -> None:
        """See `RolloutSource`."""
        try:
            self.parts.generator.close()
        finally:
            self.parts.engine.close()

    def begin(self, step: int) -> None:
        """See `RolloutSource`."""
        raise AssertionError("rollout.overlap needs sampling.streaming")

    def stop(self) -> None:
        """See `RolloutSource`."""
        return  # nothing has begun

    def batch(self, step: int, *, only_recorded: bool = False) -> StepRollouts:
        """See `RolloutSource`."""
        self.held = Held.of(self._surplus)
        self.sampler.start_step(step)
        generated = self.generate(step, only_recorded=only_recorded)
        for scores in graded_scores(generated):
            self.parts.listener.warning(f"step {step}: {scores}", kind=f"graded scores of {scores.source}")
        trained_on: list[JudgedGroup] = []

        def decide() -> _Decision:
            trained_on.extend(self.sampler.take())
            assign_advantages(trained_on, self.parts.config.advantages.estimator)
            surplus = {group.prompt_id for group in self.sampler.surplus}
            sizes = [len(group.rows) for group in trained_on]
            noted = Plan([group.prompt_id for group in trained_on], self.next_prompt)
            return _Decision(plan_of(trained_on), sizes, surplus, noted)

        told = decided_by_leader(decide, self.world, (BatchNotFilledError, DiskError, ValueError))
        self.parts.prompts.move_to(told.noted.next_prompt)
        self._surplus = self.held.groups(sorted(told.surplus))
        noted = self.carry_over(step, told.noted)
        self.held.forget_from(told.noted.next_prompt)
        self._own_metrics = {**self._staleness_in(step, told.plan), **self.own_metrics()}
        note = partial(self.parts.ledger.note_plan, step, noted, must_be_same=only_recorded)
        on_leader(note, self.world)
        judged = JudgedStep(trained_on, generated) if self.parts.ranks.rank == 0 else None
        return StepRollouts(told.plan, told.group_sizes, self.held, judged)

    def metrics(self) -> Metrics:
        """See `RolloutSource`."""
        of_sampling = decided_by_leader(self.sampler.metrics, self.world)
        own = {**self.parts.engine.metrics(), **self._own_metrics}
        return {**of_sampling, **merge_metrics(own, self.world)}

    def carry_over(self, step: int, plan: Plan) -> Plan:
        """Keep for the next step what it goes on with. Collective; called while all that was judged is in `held`.

        Returns:
            On rank 0 the plan with all that is to be noted of the step.
        """
        return plan

    def _staleness_in(self, step: int, plan: NDArray[Any]) -> Metrics:
        """How old the weights were that wrote this rank's tokens of the batch."""
        config = self.parts.config
        if not (config.sampling.max_surplus_age_steps or config.rollout.max_staleness_steps):
            return {}
        leader = self.parts.plane.leader
        own = [] if leader is None else plan[plan["leader"] == leader].tolist()
        places = [(prompt_id, sample_index) for prompt_id, _, _, _, sample_index in own]
        return staleness_metrics((self.held.samples[place] for place in places), step)

    def own_metrics(self) -> Metrics:
        """This rank's part of further metrics of the step; they replace those of sampling of the same name."""
        return {}

    def state(self) -> SourceState:
        """See `RolloutSource`."""
        return _State(self.parts.prompts.state_dict(), tuple(self._surplus), self.parts.plane)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `RolloutSource`. The surplus is shared out over the ranks that generate now."""
        self.parts.prompts.load_state_dict(state["prompts"])
        surplus = [Group.from_state_dict(group) for group in state["sampler"]["surplus"]]
        num_leaders = self.parts.plane.num_leaders
        judged = [JudgedGroup.of(group, place % num_leaders) for place, group in enumerate(surplus)]
        self._assign_rewards(judged)
        self.sampler.restore(judged)
        leader = self.parts.plane.leader
        self._surplus = [] if leader is None else surplus[leader::num_leaders]

    @property
    def sampling_params(self) -> SamplingParams:
        """How responses are sampled."""
        return SamplingParams(self.rollout.max_response_tokens, self.rollout.temperature, self.rollout.top_p)

    def enter(self, step: int, groups: Sequence[JudgedGroup]) -> None:
        """Enter whole groups into the books, with rewards, and tell of failures; on rank 0."""
        self._assign_rewards(groups)
        if self.parts.ranks.rank == 0:
            self.sampler.add_round(groups)
        for failure in failures_by_kind(groups):
            self.parts.listener.warning(f"step {step}: {failure}", kind=failure.kind)

    def _assign_rewards(self, groups: Sequence[JudgedGroup]) -> None:
        assign_rewards(groups, self.parts.config.reward, self.rollout.max_response_tokens)
