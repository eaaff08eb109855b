"""The streaming source: responses are asked for in the order of prompts as slots become free, until the batch is full.

There are no rounds. Each rank that generates keeps its engine full: as soon as one response is written, it asks for the
next one in the order of prompts, whatever group that belongs to. A response is judged as it ends. Rank 0 hears 32 bytes
of each, and says stop when the batch is full in the order of prompts; what is in flight then is aborted, and nobody
uses it. No more responses are begun than the share of groups that earlier steps have kept makes necessary. The next
step goes on with the first prompt that was not used up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any

from torch.distributed import ProcessGroup

from megatron_fipo.config import most_prompts
from megatron_fipo.metrics.reductions import Metrics, Sum
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import decided_by_leader
from megatron_fipo.parallel.ordered_work import OrderedWork
from megatron_fipo.rl.judged_group import JudgedGroup, from_bytes, to_bytes
from megatron_fipo.rl.prompt_order import KeptShare, PromptOrderBooks
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.batch_source import BatchSource, SourceParts
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
    world: ProcessGroup

    def gathered(self) -> dict[str, Any]:
        """See `SourceState`."""
        state = self.other.gathered()
        state["sampler"]["kept_share"] = list(exchange.broadcast_object(astuple(self.kept_share), self.world))
        return state


class StreamingSource(BatchSource):
    """A `RolloutSource` whose batch is full in the order of prompts.

    The batch is the same for any number of servers and any order of completion: verdicts alone decide it. On a
    repeatable engine it is the same bit for bit, since each rank asks its own engine for responses in an order that
    does not depend on time.
    """

    def __init__(self, parts: SourceParts) -> None:
        super().__init__(parts)
        self._next_prompt = 0
        self._num_unused_tokens = 0
        self._kept_share = KeptShare()
        """Of rank 0: what the steps so far say of the share of groups that are kept."""
        self._drawn: dict[int, Prompt] = {}
        """The step's prompts that this rank has made, by prompt_id."""

    @property
    def next_prompt(self) -> int:
        """See `BatchSource`."""
        return self._next_prompt

    def generate(self, step: int, *, only_recorded: bool) -> list[JudgedGroup]:
        """See `BatchSource`."""
        parts = self.parts
        first, self._drawn = parts.prompts.position, {}
        plan = decided_by_leader(lambda: parts.ledger.plan(step), self.world)
        if only_recorded and plan is None:
            num_lost = self.rollout.num_prompts * self.rollout.num_samples_per_prompt
            parts.generator.check_complete(step, num_lost if parts.ranks.rank == 0 else 0)
        if plan is not None and self._replay(step, range(first, plan.next_prompt), only_recorded):
            self._next_prompt, self._num_unused_tokens = plan.next_prompt, 0
            groups = parts.plane.judged(self.held.groups(range(first, plan.next_prompt)))
        else:
            groups = self._stream(step, range(first, first + most_prompts(parts.config)))
        self.enter(step, groups)
        num_kept = sum(self.sampler.is_kept(group) for group in groups)
        self._kept_share = self._kept_share.after(num_kept, len(groups))
        return groups

    def own_metrics(self) -> Metrics:
        """See `BatchSource`."""
        return {UNUSED_TOKENS: Sum(self._num_unused_tokens)}

    def state(self) -> SourceState:
        """See `RolloutSource`."""
        return _StreamingState(super().state(), self._kept_share, self.world)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `RolloutSource`. A run that did not stream before knows of no share."""
        super().load_state_dict(state)
        self._kept_share = KeptShare(*state["sampler"].get("kept_share", ()))

    def _key_of(self, first_prompt: int, ticket: int) -> tuple[Prompt, SampleKey]:
        """The response that a ticket stands for: they count through all samples of one prompt after the other."""
        place, sample_index = divmod(ticket, self.rollout.num_samples_per_prompt)
        prompt_id = first_prompt + place
        if prompt_id not in self._drawn:
            self._drawn[prompt_id] = self.parts.prompts.prompt(prompt_id)
        prompt = self._drawn[prompt_id]
        return prompt, SampleKey(prompt.source, prompt_id, sample_index)

    def _replay(self, step: int, prompts: range, only_recorded: bool) -> bool:
        """Take a step that was decided before from its records. Collective.

        Returns:
            Whether all of it is recorded; if not, nothing was taken.

        Raises:
            ValueError: on every rank, if something is missing with `only_recorded`.
        """
        plane, generator = self.parts.plane, self.parts.generator
        tickets = range(len(prompts) * self.rollout.num_samples_per_prompt)
        own = [] if plane.leader is None else tickets[plane.leader :: plane.num_leaders]
        wanted = [self._key_of(prompts.start, ticket) for ticket in own]
        found = generator.recorded(step, wanted)
        own_missing = sum(sample is None for sample in found)
        if only_recorded:
            generator.check_complete(step, own_missing)
        if any(exchange.all_gather_objects(own_missing, self.world)):
            return False
        for (prompt, _), sample in zip(wanted, found, strict=True):
            assert sample is not None, "none is missing"
            self._hold(step, prompt, sample)
        return True

    def _stream(self, step: int, prompts: range) -> list[JudgedGroup]:
        """Generate until the batch is full in the order of prompts. Collective."""
        parts, rollout, num_samples = self.parts, self.rollout, self.rollout.num_samples_per_prompt
        plane, listener = parts.plane, parts.listener
        books: PromptOrderBooks | None = None
        is_repeatable = parts.engine.repeatable
        if parts.ranks.rank == 0:
            books = PromptOrderBooks(
                prompts,
                num_samples,
                rollout.num_prompts,
                self.sampler.is_kept,
                self._kept_share,
                is_adaptive=not is_repeatable,
            )
        num_to_begin: int = exchange.broadcast_object(None if books is None else books.num_to_begin, self.world)
        work = OrderedWork(plane.leader, plane.num_leaders, num_to_begin * num_samples, is_dealt=is_repeatable)

        def look() -> None:
            if books is not None:
                for part in from_bytes(work.told()):
                    books.add(part)
                work.extend(books.num_to_begin * num_samples)
                if books.is_over and not work.is_over:
                    work.end()

        with listener.rollout_progress(step, rollout.num_prompts * num_samples // plane.num_leaders) as progress:

            def on_judged(prompt: Prompt, sample: Trajectory) -> None:
                one = self._hold(step, prompt, sample)
                work.tell(to_bytes([JudgedGroup.of(one, plane.leader or 0)]))
                progress.advance()
                look()

            begun_in_vain = parts.generator.stream(
                step, work, self.sampling_params, lambda ticket: self._key_of(prompts.start, ticket), on_judged, look
            )
        self._num_unused_tokens = begun_in_vain
        if books is None:
            return []
        look()
        if not books.is_over:
            raise GenerationAbortedError(
                f"step {step}: generation was aborted before its batch was full, and not by this run. Let nobody else "
                "end requests of the run's servers, and run the same command again: what is recorded is taken up."
            )
        self._next_prompt = books.next_prompt
        self._num_unused_tokens += books.num_tokens_beyond
        return books.groups()

    def _hold(self, step: int, prompt: Prompt, sample: Trajectory) -> Group:
        """Keep a judged response. What was needed to judge it alone is dropped."""
        sample.response_text = ""
        group = Group(replace(prompt, row=None), [sample], step)
        self.held.add(group)
        return group
