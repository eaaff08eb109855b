"""Groups of judged responses, generated on all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_fipo.config import Config
from megatron_fipo.convert.dtypes import MODEL_DTYPES
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups, device
from megatron_fipo.parallel.waiting import Work
from megatron_fipo.rl.trajectory import Group, Prompt, Sample
from megatron_fipo.rollout.collect import generate_groups
from megatron_fipo.rollout.engine import RolloutEngine, SamplingParams
from megatron_fipo.rollout.in_process.engine import InProcessEngine, find_stop_token_ids
from megatron_fipo.rollout.ledger import RolloutLedger, SampleKey
from megatron_fipo.rollout.servers.engine import ServerEngine
from megatron_fipo.rollout.servers.setup import build_server_engine
from megatron_fipo.system.event_loop import run_to_end
from megatron_fipo.verifiers.combined import judge_combined
from megatron_fipo.verifiers.pool import VerifierPool
from megatron_fipo.verifiers.verdict import Verdict, VerifierJob


class GroupGenerator:
    """Shares prompts out over the ranks' engines and verifiers, and brings the judged groups back to every rank.

    In-process engines are on every rank, so every rank generates, whatever model-parallel group it belongs to. With
    servers the leader of each node does, and the others wait for it.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        verifiers: VerifierPool,
        tokenizer: Any,
        ranks: ParallelGroups,
        run_seed: int,
        ledger: RolloutLedger,
        share: tuple[int, int] | None,
        leave_if_asked: Callable[[], None],
    ) -> None:
        """
        Args:
            ledger: takes down training's responses, and gives back those of a run that was killed.
            share: (index, count) of this rank among those that generate; None where it only waits.
            leave_if_asked: called on all ranks before and after each generation; raises where the run is to end, so
                that no generation begins after the signal, and no response that was cut short counts as a whole one.
        """
        self._engine, self._verifiers, self._tokenizer = engine, verifiers, tokenizer
        self._ranks, self._run_seed, self._ledger = ranks, run_seed, ledger
        self._share, self._leave_if_asked = share, leave_if_asked

    def own_share(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The prompts that this rank generates for."""
        return [] if self._share is None else list(prompts[self._share[0] :: self._share[1]])

    def generate(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        sampling: SamplingParams,
        step: int,
        on_sample: Callable[[Sample], None],
        round_index: int | None = None,
        only_recorded: bool = False,
    ) -> list[Group]:
        """Judged groups of all prompts, in prompt order, the same on every rank. Collective over all ranks.

        Args:
            step: part of the key of each response's randomness.
            on_sample: called with each of this rank's samples when it is judged, or found in the ledger.
            round_index: which of the step's rounds of generation this is, for the ledger; None keeps out of the ledger.
            only_recorded: take every response from the ledger: the policy that wrote them is gone.

        Raises:
            ValueError: if the ledger is damaged, or lacks a response with `only_recorded`.
            OtherRankError: if generation failed on another rank.
        """
        self._leave_if_asked()
        own_prompts = self.own_share(prompts)
        finished = self._finished(step, round_index, own_prompts, num_samples)
        own_missing = len(own_prompts) * num_samples - len(finished)
        if only_recorded and (num_missing := sum(exchange.all_gather_objects(own_missing, self._ranks.world))):
            raise ValueError(
                f"step {step}: the checkpoint was saved between this step's updates, and of the rollouts that they are "
                f"made on {num_missing} are not recorded any more. Bring the run's folder rollouts/ back, or delete "
                "the checkpoint to go on from the one before."
            )
        for sample in finished.values():
            on_sample(sample)
        sources = {prompt.prompt_id: prompt.source for prompt in own_prompts}

        def note(sample: Sample) -> None:
            if round_index is not None and sample.finish_reason != "abort":
                self._ledger.append(round_index, sources[sample.prompt_id], sample)
            on_sample(sample)

        with Work(self._ranks.world, f"generation in step {step}", on_failure_elsewhere=self._engine.abort):
            own = run_to_end(
                generate_groups(
                    self._engine,
                    own_prompts,
                    self._judge,
                    decode=self._decode,
                    num_samples=num_samples,
                    sampling=sampling,
                    run_seed=self._run_seed,
                    step=step,
                    on_sample=note,
                    finished=finished,
                )
            )
            if round_index is not None:
                self._ledger.secure()
        self._leave_if_asked()
        for group in own:  # a row was there to be judged by: it goes neither to other ranks nor into checkpoints
            group.prompt = replace(group.prompt, row=None)
        if round_index is not None:
            _make_compact(own)
        shares = exchange.all_gather_objects(own, self._ranks.world)
        by_id = {group.prompt.prompt_id: group for share in shares for group in share}
        groups = [by_id[prompt.prompt_id] for prompt in prompts]
        for group, prompt in zip(groups, prompts, strict=True):
            _make_whole(group, prompt)
        return groups

    def _finished(
        self, step: int, round_index: int | None, own_prompts: Sequence[Prompt], num_samples: int
    ) -> Mapping[SampleKey, Sample]:
        """This rank's samples that a run before this one has generated and judged.

        An engine that repeats itself bit for bit is given an unfinished share whole: with fewer requests beside them,
        the missing ones would round otherwise.
        """
        if round_index is None:
            return {}
        finished = self._ledger.finished(step, round_index, own_prompts)
        is_whole = len(finished) == len(own_prompts) * num_samples
        return finished if is_whole or not self._engine.repeatable else {}

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    async def _judge(self, prompt: Prompt, response_text: str, finish_reason: str) -> Verdict:
        job = VerifierJob(prompt.verifier, response_text, prompt.reference, finish_reason, prompt.text, prompt.row)
        return await judge_combined(self._verifiers, job)


def _make_compact(groups: Sequence[Group]) -> None:
    """Leave what other ranks need of samples to be trained on: 8 bytes a token, and no text."""
    for sample in (sample for group in groups for sample in group.samples):
        sample.prompt_ids = torch.empty(0, dtype=torch.int32)
        sample.response_ids = sample.response_ids.int()
        sample.response_text = ""


def _make_whole(group: Group, prompt: Prompt) -> None:
    """Undo `_make_compact`, but for the text."""
    prompt_ids = torch.tensor(prompt.token_ids, dtype=torch.int64)
    for sample in group.samples:
        sample.prompt_ids = prompt_ids
        sample.response_ids = sample.response_ids.long()


def in_process_engine(config: Config, tokenizer: Any) -> InProcessEngine:
    """The engine of rollout.engine=in_process, on this process's device."""
    return InProcessEngine(
        config.model.path,
        dtype=MODEL_DTYPES[config.model.dtype],
        max_batch_size=config.rollout.max_batch_size,
        device=device(),
        tokenizer=tokenizer,
    )


def build_engine(
    config: Config, ranks: ParallelGroups, tokenizer: Any, folder: Path
) -> tuple[InProcessEngine | ServerEngine, tuple[int, int] | None]:
    """The run's rollout engine, its servers not started yet, and this rank's share of the prompts.

    Collective over all ranks.

    Args:
        folder: for what servers log and keep.

    Returns:
        (engine, (index, count) of this rank among those that generate, None where it does not).

    Raises:
        ValueError: if the model, the devices or the configuration do not fit together.
    """
    if config.rollout.engine == "in_process":
        return in_process_engine(config, tokenizer), (ranks.rank, ranks.world.size())
    stop_token_ids = find_stop_token_ids(config.model.path, tokenizer)
    servers = build_server_engine(config, ranks, stop_token_ids, folder)
    return servers, servers.share
