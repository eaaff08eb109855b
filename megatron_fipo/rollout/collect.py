"""From prompts to judged groups: generation and verification of many responses at once, over any engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeAlias

from megatron_fipo.config import without_secrets
from megatron_fipo.rl.trajectory import Group, Prompt, Sample
from megatron_fipo.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams, sample_seed
from megatron_fipo.verifiers.verdict import Verdict

Judge: TypeAlias = Callable[[Prompt, str, str], Awaitable[Verdict]]
"""(prompt, response_text, finish_reason) -> Verdict; what cannot be judged comes back as a verdict with an error."""

ABORTED = "generation was aborted"
"""`Sample.error` of a response that the engine ended early: unfinished work, neither right nor wrong."""


async def generate_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    judge: Judge,
    *,
    decode: Callable[[list[int]], str],
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    step: int,
    on_sample: Callable[[Sample], None] | None = None,
    finished: Mapping[tuple[str, int, int], Sample] | None = None,
) -> list[Group]:
    """Generate num_samples responses to each prompt and judge each as soon as it is there, while others are decoded.

    Args:
        engine: generates.
        prompts: one group is made for each; (source, prompt_id) must differ.
        judge: asynchronous verifier. Not asked about aborted responses.
        decode: response tokens to the text that is judged (special tokens left out).
        num_samples: responses to each prompt.
        sampling: how to sample.
        run_seed: with step, prompt_id and sample_index the key of each response's randomness.
        step: written into the groups. An evaluation that passes the same step every time repeats the same random
            numbers, so that two policies are compared on equal terms.
        on_sample: called with each judged sample, in order of completion, for progress.
        finished: judged samples by (source, prompt_id, sample_index) that exist already; they are not generated, and
            `on_sample` does not hear of them.

    Returns:
        Groups in the order of the prompts, samples by sample_index, whatever finished first. `reward` is not set yet.

    Raises:
        ValueError: if two prompts share source and prompt_id.
        Exception: the first error of the engine or the judge; all else in flight is cancelled and awaited first.
    """
    if len({(prompt.source, prompt.prompt_id) for prompt in prompts}) != len(prompts):
        raise ValueError("generate_groups: two prompts have the same source and prompt_id; one group is made for each")

    async def one(prompt: Prompt, sample_index: int) -> Sample:
        known = (finished or {}).get((prompt.source, prompt.prompt_id, sample_index))
        if known is not None:
            return known
        sample = await engine.generate(
            GenerationRequest(
                sample_id=f"{step}/{prompt.source}/{prompt.prompt_id}/{sample_index}",
                group_id=prompt.prompt_id,
                sample_index=sample_index,
                prompt_ids=prompt.token_ids,
                sampling=sampling,
                seed=sample_seed(run_seed, step, prompt.prompt_id, sample_index),
            )
        )
        sample.response_text = decode(sample.response_ids.tolist())
        if sample.finish_reason == "abort":
            sample.error = ABORTED
        else:
            verdict = await judge(prompt, sample.response_text, sample.finish_reason)
            sample.accuracy, sample.answer = verdict.score, verdict.answer
            sample.error = without_secrets(verdict.error)  # a reward model's URL may hold one
            sample.parts = dict(verdict.parts)
        if on_sample is not None:
            on_sample(sample)
        return sample

    tasks = [asyncio.ensure_future(one(prompt, index)) for prompt in prompts for index in range(num_samples)]
    try:
        samples = await asyncio.gather(*tasks)
    finally:
        # After success this finds nothing to do. After an error or a cancellation nothing may go on generating.
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [
        Group(prompt=prompt, samples=list(samples[i * num_samples : (i + 1) * num_samples]), created_at_step=step)
        for i, prompt in enumerate(prompts)
    ]
