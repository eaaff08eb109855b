"""The synchronous source: a step's responses are generated in rounds when the step asks for them, as the paper does."""

from __future__ import annotations

from megatron_fipo.parallel.agreement import decided_by_leader, on_every_rank
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.trajectory import Group
from megatron_fipo.rollout.batch_source import BatchSource
from megatron_fipo.rollout.engine import NO_PLACES


class SynchronousSource(BatchSource):
    """A `RolloutSource` that generates in rounds until dynamic sampling has a batch.

    Each round waits for its slowest response, and groups beyond the batch are kept for later steps or thrown away.
    """

    def generate(self, step: int, *, only_recorded: bool) -> list[JudgedGroup]:
        """See `BatchSource`."""
        generated: list[JudgedGroup] = []
        round_index = 0
        while num_prompts := decided_by_leader(self._next_round_size, self.world):
            own = self._round(step, round_index, num_prompts, only_recorded)
            for group in own:
                self.held.add(group)
            groups = self.parts.plane.judged(own)
            self.enter(step, groups)
            generated += groups
            round_index += 1
        return generated

    @property
    def next_prompt(self) -> int:
        """See `BatchSource`."""
        return self.parts.prompts.position

    def _next_round_size(self) -> int:
        """Prompts of the next round; 0 where no further one is needed."""
        sampler = self.sampler
        if not sampler.needs_round:
            return 0
        missing = self.rollout.num_prompts if sampler.num_rounds == 0 else 2 * sampler.num_missing
        return self.rollout.num_prompts_per_round or missing

    def _round(self, step: int, round_index: int, num_prompts: int, only_recorded: bool) -> list[Group]:
        """This rank's judged groups of one round."""
        generator, order = self.parts.generator, self.parts.prompts
        first, num_samples = order.position, self.rollout.num_samples_per_prompt
        own_ids = range(first, first + num_prompts)[NO_PLACES if generator.share is None else generator.share.places]
        prompts = on_every_rank(lambda: [order.prompt(prompt_id) for prompt_id in own_ids], self.world)
        order.move_to(first + num_prompts)
        with self.parts.listener.rollout_progress(step, len(prompts) * num_samples) as progress:
            return generator.generate(
                prompts,
                num_samples,
                self.sampling_params,
                step,
                on_sample=lambda sample: progress.advance(),
                round_index=round_index,
                only_recorded=only_recorded,
            )
