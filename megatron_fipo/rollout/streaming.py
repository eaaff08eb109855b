"""The streaming source: responses are asked for in the order of prompts as slots become free, until the batch is full.

There are no rounds. Each rank that generates keeps its engine full: as soon as one response is written, it asks for the
next one in the order of prompts, whatever group that belongs to. A response is judged as it ends. Rank 0 hears 32 bytes
of each, and says stop when the batch is full in the order of prompts; what is in flight then is aborted. The next step
goes on with the first prompt that was not used up.

On-policy (rollout.max_staleness_steps=0) nobody uses what was aborted or finished too early, and no more responses are
begun than the share of groups that earlier steps have kept makes necessary. Otherwise prompts are begun so many steps
ahead, and the next step goes on with what there is of them: `carry_over`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from typing import Any

from torch.distributed import ProcessGroup

from megatron_fipo.config import most_prompts
from megatron_fipo.metrics.reductions import Metrics, Sum
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import decided_by_leader, on_every_rank
from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.rl.judged_group import JudgedGroup, to_bytes
from megatron_fipo.rl.prompt_order import FreshSamples, KeptShare, PromptOrderBooks
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.batch_source import BatchSource, SourceParts
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.carry_over import CarryOver
from megatron_fipo.rollout.generation import StreamOrder
from megatron_fipo.rollout.held import Held
from megatron_fipo.rollout.ledger import Plan
from megatron_fipo.rollout.open_step import OpenStep, hold
from megatron_fipo.rollout.source import SourceState

UNUSED_TOKENS = "rollout/unused_tokens"


class GenerationAbortedError(RuntimeError):
    """Somebody else has ended the requests of a step."""


@dataclass(frozen=True)
class _StreamingState:
    """A `SourceState` with the share of groups that are kept."""

    other: SourceState
    kept_share: KeptShare
    """Of rank 0."""
    num_carried: int
    """Responses that the next step goes on with, on rank 0."""
    world: ProcessGroup

    def gathered(self) -> dict[str, Any]:
        """See `SourceState`."""
        state = self.other.gathered()
        told = exchange.broadcast_object((astuple(self.kept_share), self.num_carried), self.world)
        state["sampler"]["kept_share"], state["sampler"]["num_carried"] = list(told[0]), told[1]
        return state


class StreamingSource(BatchSource):
    """A `RolloutSource` whose batch is full in the order of prompts.

    The batch is the same for any number of servers and any order of completion: verdicts alone decide it. On a
    repeatable engine it is the same bit for bit, since each rank asks its own engine for responses in an order that
    does not depend on time. Where responses are carried over, their texts depend on where a step has cut them: there a
    repeatable engine comes to the same batch on as many ranks.
    """

    def __init__(self, parts: SourceParts) -> None:
        super().__init__(parts)
        self._next_prompt = 0
        self._num_unused_tokens = 0
        self._kept_share = KeptShare()
        """Of rank 0: what the steps so far say of the share of groups that are kept."""
        self._drawn: dict[int, Prompt] = {}
        """The step's prompts that this rank has made, by prompt_id."""
        self._carry_over = CarryOver(self.rollout, parts.plane, parts.ledger, parts.listener, self.world)
        self._left: list[Carried] | None = []
        """What the step has begun here and is not judged; None where the step was taken from its records."""
        self._recorded_plan: Plan | None = None
        """The plan of a step that was taken from its records."""
        self._open: OpenStep | None = None
        """The step that is being generated while the one before it trains."""

    @property
    def next_prompt(self) -> int:
        """See `BatchSource`."""
        return self._next_prompt

    def begin(self, step: int) -> None:
        """See `RolloutSource`."""
        first, plan = self._look_up(step)
        if plan is None:  # otherwise `batch` takes what is recorded
            prompts = range(first, first + most_prompts(self.parts.config))
            self._open = self._opened(step, prompts, Held(), version=step - 1)
            self.parts.generator.begin_stream(self._open.order)

    def stop(self) -> None:
        """See `RolloutSource`."""
        if self._open is not None:
            self._open.work.end()
            self._open = None
            self.parts.generator.finish_stream()

    def generate(self, step: int, *, only_recorded: bool) -> list[JudgedGroup]:
        """See `BatchSource`."""
        parts = self.parts
        if self._open is not None:
            groups = self._finish(self._open)
        else:
            first, plan = self._look_up(step)
            if only_recorded and plan is None:
                num_lost = self.rollout.num_prompts * self.rollout.num_samples_per_prompt
                parts.generator.check_complete(step, num_lost if parts.ranks.rank == 0 else 0)
            if plan is not None and self._replay(step, range(first, plan.next_prompt), only_recorded):
                self._next_prompt, self._num_unused_tokens, self._left = plan.next_prompt, 0, None
                groups = parts.plane.judged(self.held.groups(range(first, plan.next_prompt)))
            else:
                groups = self._stream(self._opened(step, range(first, first + most_prompts(parts.config)), self.held))
        self.enter(step, groups)
        num_kept = sum(self.sampler.is_kept(group) for group in groups)
        self._kept_share = self._kept_share.after(num_kept, len(groups))
        return groups

    def _look_up(self, step: int) -> tuple[int, Plan | None]:
        """The step's first prompt, and its plan if it was decided before. Collective."""
        first, self._drawn = self.parts.prompts.position, {}
        plan = self._recorded_plan = decided_by_leader(lambda: self.parts.ledger.plan(step), self.world)
        # A repeatable engine generates all of it again: beside others the missing ones would be rounded differently.
        self._carry_over.begin(step, first, takes_up=plan is None and not self.parts.engine.repeatable)
        return first, plan

    def carry_over(self, step: int, plan: Plan) -> Plan:
        """See `BatchSource`."""
        carry_over, left = self._carry_over, self._left
        if not carry_over.is_on:
            return plan
        if left is None:
            assert self._recorded_plan is not None, "the step was taken from its records"
            carry_over.keep_recorded(step, self._recorded_plan.num_carried)
        else:
            on_every_rank(lambda: carry_over.keep(step, self.held, left, plan.next_prompt), self.world)
        return replace(plan, num_carried=carry_over.count())

    def own_metrics(self) -> Metrics:
        """See `BatchSource`."""
        return {UNUSED_TOKENS: Sum(self._num_unused_tokens), **self._carry_over.metrics()}

    def state(self) -> SourceState:
        """See `RolloutSource`."""
        return _StreamingState(super().state(), self._kept_share, self._carry_over.num_expected, self.world)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `RolloutSource`. A run that did not stream before knows of no share."""
        super().load_state_dict(state)
        self._kept_share = KeptShare(*state["sampler"].get("kept_share", ()))
        self._carry_over.expect(state["sampler"].get("num_carried", 0))

    def _prompt(self, prompt_id: int) -> Prompt:
        if prompt_id not in self._drawn:
            self._drawn[prompt_id] = self.parts.prompts.prompt(prompt_id)
        return self._drawn[prompt_id]

    def _key_of(self, fresh: FreshSamples, ticket: int) -> tuple[Prompt, SampleKey]:
        """The response that a ticket stands for: they count through all fresh samples of one prompt after the other."""
        prompt_id, sample_index = fresh.at(ticket)
        prompt = self._prompt(prompt_id)
        return prompt, SampleKey(prompt.source, prompt_id, sample_index)

    def _hold_judged(self, held: Held, step: int, prompts: range) -> list[Group]:
        """Hold this rank's responses that earlier steps have had judged. Returns those to some of the prompts."""
        judged = self._carry_over.judged(self._prompt)
        return [hold(held, step, prompt, one.response) for prompt, one in judged if prompt.prompt_id in prompts]

    def _replay(self, step: int, prompts: range, only_recorded: bool) -> bool:
        """Take a step that was decided before from its records. Collective.

        Returns:
            Whether all of it is recorded; if not, nothing was taken.

        Raises:
            ValueError: on every rank, if something is missing with `only_recorded`.
        """
        plane, generator = self.parts.plane, self.parts.generator
        # Those that were judged before the step are with the ranks that took them over.
        generated = FreshSamples(prompts.start, self.rollout.num_samples_per_prompt, self._carry_over.judged_everywhere)
        tickets = range(generated.num_until(len(prompts)))
        own = [] if plane.leader is None else tickets[plane.leader :: plane.num_leaders]
        wanted = [self._key_of(generated, ticket) for ticket in own]
        found = generator.recorded(step, wanted)
        own_missing = sum(sample is None for sample in found)
        if only_recorded:
            generator.check_complete(step, own_missing)
        if any(exchange.all_gather_objects(own_missing, self.world)):
            return False
        for (prompt, _), sample in zip(wanted, found, strict=True):
            assert sample is not None, "none is missing"
            hold(self.held, step, prompt, sample)
        self._hold_judged(self.held, step, prompts)
        return True

    def _opened(self, step: int, prompts: range, held: Held, version: int | None = None) -> OpenStep:
        """A step that is to be generated. Collective.

        Args:
            held: takes what is judged.
            version: of the weights with which it begins, where the step's own come later.
        """
        parts, rollout, num_samples = self.parts, self.rollout, self.rollout.num_samples_per_prompt
        plane, carry_over, is_repeatable = parts.plane, self._carry_over, parts.engine.repeatable
        books: PromptOrderBooks | None = None
        if parts.ranks.rank == 0:
            parts.ledger.forget_after(step)
            books = PromptOrderBooks(
                prompts,
                num_samples,
                rollout.num_prompts,
                self.sampler.is_kept,
                self._known_share(),
                # What is begun with weights of the step before has waited for a step already.
                num_steps_ahead=rollout.max_staleness_steps - (version is not None),
                is_adaptive=carry_over.is_on or not is_repeatable,
            )
        num_to_begin: int = exchange.broadcast_object(None if books is None else books.num_to_begin, self.world)
        fresh = FreshSamples(prompts.start, num_samples, carry_over.everywhere)
        work = OrderedWork(plane.leader, plane.num_leaders, fresh.num_until(num_to_begin), is_dealt=is_repeatable)

        def on_judged(prompt: Prompt, sample: Trajectory) -> None:
            one = hold(held, step, prompt, sample)
            work.tell(to_bytes([JudgedGroup.of(one, plane.leader or 0)]))
            opened.num_judged += 1
            opened.show()

        order = StreamOrder(
            step,
            work,
            self.sampling_params,
            lambda ticket: self._key_of(fresh, ticket),
            on_judged,
            lambda: opened.look(),
            carry_over.unfinished(self._prompt),
            keeps=carry_over.is_on,
            version=version,
        )
        opened = OpenStep(order, held, fresh, books)
        if version is None:
            opened.is_wanted.set()
        if known := self._hold_judged(held, step, prompts):
            rows = [JudgedGroup.of(one, plane.leader or 0) for one in known]
            work.tell(to_bytes(rows), about_ticket=False)
        return opened

    def _stream(self, opened: OpenStep) -> list[JudgedGroup]:
        """Generate until the batch is full in the order of prompts. Collective."""
        with self._progress(opened) as show:
            opened.show = show
            self._num_unused_tokens, self._left = self.parts.generator.stream(opened.order)
        return self._groups_of(opened)

    def _finish(self, opened: OpenStep) -> list[JudgedGroup]:
        """Wait until the batch of a step is full that is being generated already. Collective."""
        self._open, self.held = None, opened.held
        if opened.books is not None:
            opened.num_steps_ahead = self.rollout.max_staleness_steps
        opened.is_wanted.set()
        with self._progress(opened) as show:
            self._num_unused_tokens, self._left = self.parts.generator.finish_stream(show)
        return self._groups_of(opened)

    @contextmanager
    def _progress(self, opened: OpenStep) -> Iterator[Callable[[], None]]:
        """A display of the step's progress, and what brings it up to date."""
        total = self.rollout.num_prompts * self.rollout.num_samples_per_prompt // self.parts.plane.num_leaders
        with self.parts.listener.rollout_progress(opened.order.step, total) as progress:
            num_shown = 0

            def show() -> None:
                nonlocal num_shown
                before, num_shown = num_shown, opened.num_judged
                progress.advance(num_shown - before)

            yield show

    def _groups_of(self, opened: OpenStep) -> list[JudgedGroup]:
        """The groups of a step whose stream has ended, on rank 0.

        Raises:
            GenerationAbortedError: if it has ended too early.
        """
        books = opened.books
        if books is None:
            return []
        opened.look()
        if not books.is_over:
            raise GenerationAbortedError(
                f"step {opened.order.step}: generation was aborted before its batch was full, and not by this run. Let "
                "nobody else end requests of the run's servers, and run the same command again: what is recorded is "
                "taken up."
            )
        self._next_prompt = books.next_prompt
        if not self._carry_over.is_on:
            self._num_unused_tokens += books.num_tokens_beyond
        return books.groups()

    def _known_share(self) -> KeptShare:
        """What is known of the share of groups that are kept.

        Where prompts are begun ahead, a run's first step has enough of them in flight not to believe the first few
        groups that it judges: what it begins beyond the bound of staleness is lost.
        """
        if self._kept_share.used or not self._carry_over.is_on:
            return self._kept_share
        weight = self.rollout.num_prompts / 4
        return KeptShare(weight, weight)
