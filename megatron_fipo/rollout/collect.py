"""Turns prompts into judged groups: many trajectories at once, over any engine and environment."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from megatron_fipo.environments.environment import Environment, Speak
from megatron_fipo.rl.trajectory import Group, Prompt, SampleKey, Trajectory
from megatron_fipo.rollout.carried import Carried
from megatron_fipo.rollout.engine import GenerationRequest, RolloutEngine, SamplingParams, Turn, sample_seed


async def generate_groups(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    environment: Environment,
    *,
    num_samples: int,
    sampling: SamplingParams,
    run_seed: int,
    step: int,
    on_sample: Callable[[Trajectory], None] | None = None,
    finished: Mapping[SampleKey, Trajectory] | None = None,
) -> list[Group]:
    """Play each prompt num_samples times. A response is judged as soon as it is complete, while others are decoded.

    Args:
        engine: generates.
        prompts: one group is made for each; (source, prompt_id) must differ.
        environment: answers and judges.
        num_samples: responses to each prompt.
        sampling: how to sample.
        run_seed: with step, prompt_id and sample_index the key of each response's randomness.
        step: written into the groups. An evaluation that passes the same step every time repeats the same random
            numbers, so that two policies are compared on equal terms.
        on_sample: called with each judged trajectory, in order of completion, for progress.
        finished: judged trajectories that exist already. They are not generated again, nor passed to `on_sample`.

    Returns:
        Groups in the order of the prompts, samples by sample_index, whatever finished first. `reward` is not set yet.

    Raises:
        ValueError: if two prompts share source and prompt_id.
        Exception: the first error of the engine or the environment; all else in flight is cancelled and awaited first.
    """
    if len({(prompt.source, prompt.prompt_id) for prompt in prompts}) != len(prompts):
        raise ValueError("generate_groups: two prompts have the same source and prompt_id; one group is made for each")

    async def one(prompt: Prompt, sample_index: int) -> Trajectory:
        key = SampleKey(prompt.source, prompt.prompt_id, sample_index)
        known = (finished or {}).get(key)
        if known is not None:
            return known

        seed = sample_seed(run_seed, step, key.prompt_id, key.sample_index)
        trajectory = await environment.play(prompt, key, speaker(engine, prompt, key, sampling, step, seed))
        if on_sample is not None:
            on_sample(trajectory)
        return trajectory

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


def speaker(
    engine: RolloutEngine,
    prompt: Prompt,
    key: SampleKey,
    sampling: SamplingParams,
    step: int,
    seed: int,
    carried: Carried | None = None,
) -> Speak:
    """The function by which the policy writes its turns of one trajectory.

    Args:
        seed: key of the trajectory's randomness.
        carried: what an earlier step has written of the first turn, which goes on from there.
    """

    def request_after(prefix: Sequence[int]) -> GenerationRequest:
        return GenerationRequest(
            sample_id=f"{step}/{key.source}/{key.prompt_id}/{key.sample_index}",
            group_id=key.prompt_id,
            sample_index=key.sample_index,
            prompt_ids=prompt.token_ids,
            sampling=sampling,
            seed=seed,
            prefix=tuple(prefix),
        )

    async def speak(response_so_far: Sequence[int]) -> Turn:
        if carried is None or response_so_far:
            return await engine.generate(request_after(response_so_far))
        before = carried.response
        if before.finish_reason != "abort":  # it is written, and was not judged any more
            return Turn(request_after(()), before.segments, before.finish_reason)
        rest = await engine.generate(request_after(before.response_ids.tolist()))
        return Turn(request_after(()), [*before.segments, *rest.segments], rest.finish_reason)

    return speak
