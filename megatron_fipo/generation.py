"""Groups of judged responses, generated on all ranks together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.types import Group, Prompt, Sample
from megatron_fipo.rl.verifiers.pool import VerifierPool
from megatron_fipo.rl.verifiers.verdict import Verdict, VerifierJob
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams


class GroupGenerator:
    """Shares prompts out over the ranks' engines and verifiers, and brings the judged groups back to every rank.

    In-process engines are on every rank, so every rank generates, whatever model-parallel group it belongs to.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        verifiers: VerifierPool,
        tokenizer: Any,
        ranks: ParallelGroups,
        run_seed: int,
        leave_if_asked: Callable[[], None],
    ) -> None:
        """
        Args:
            leave_if_asked: called on all ranks before and after each generation; raises where the run is to end, so
                that no generation begins after the signal, and no response that was cut short counts as a whole one.
        """
        self._engine, self._verifiers, self._tokenizer = engine, verifiers, tokenizer
        self._ranks, self._run_seed = ranks, run_seed
        self._leave_if_asked = leave_if_asked

    def own_share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that this rank generates for."""
        return list(prompts[self._ranks.rank :: self._ranks.world.size()])

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        step: int,
        on_sample: Callable[[Sample], None],
    ) -> list[Group]:
        """Judged groups of all prompts, in prompt order, the same on every rank. Collective over all ranks.

        Args:
            step: part of the key of each response's randomness.
            on_sample: called with each of this rank's samples when it is judged.
        """
        self._leave_if_asked()
        own = asyncio.run(
            generate_groups(
                self._engine,
                self.own_share(prompts),
                self._judge,
                decode=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True),
                num_samples=num_samples,
                sampling=sampling,
                run_seed=self._run_seed,
                step=step,
                on_sample=on_sample,
            )
        )
        self._leave_if_asked()
        shares = exchange.all_gather_objects(own, self._ranks.world)
        by_id = {group.prompt.prompt_id: group for share in shares for group in share}
        return [by_id[prompt.prompt_id] for prompt in prompts]

    async def _judge(self, prompt: Prompt, response_text: str, finish_reason: str) -> Verdict:
        job = VerifierJob(prompt.verifier, response_text, prompt.reference, finish_reason)
        return await self._verifiers.judge(job)
