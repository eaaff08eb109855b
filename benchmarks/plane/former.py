"""How a step's responses moved before the data plane: every rank got a pickle of all of them, and decided for itself.

Kept to be measured against. It does what commit b43ddaa did, with this project's present classes.
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_fipo.config import Config
from megatron_fipo.parallel import by_value, exchange
from megatron_fipo.parallel.batch import divide
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.advantages import ESTIMATORS, is_correct, overlong_penalty
from megatron_fipo.rl.trajectory import Group, Trajectory


def compact(groups: Sequence[Group]) -> list[Group]:
    """Groups as they were pickled: an int32 id and a float32 log-prob a token, without tokens of the prompts."""
    for group in groups:
        group.prompt = replace(group.prompt, row=None)
        for sample in group.samples:
            sample.prompt_ids, sample.response_text = torch.empty(0, dtype=torch.int32), ""
            for segment in sample.segments:
                segment.token_ids = segment.token_ids.int()
    return list(groups)


def pickled_bytes(groups: Sequence[Group]) -> int:
    """Bytes of a rank's share, as torch sends it: the pickle of a pickle."""
    return len(pickle.dumps(by_value.dumps(compact(groups))))


def wanted_samples(ranks: ParallelGroups, own: Sequence[Group], config: Config) -> dict[int, Trajectory]:
    """What this rank trains on, by its place in the batch. Collective."""
    shares = exchange.all_gather_objects(compact(own), ranks.world)
    groups = sorted((group for share in shares for group in share), key=lambda group: group.prompt.prompt_id)
    for group in groups:
        prompt_ids = torch.tensor(group.prompt.token_ids, dtype=torch.int64)
        for sample in group.samples:
            sample.prompt_ids = prompt_ids
            for segment in sample.segments:
                segment.token_ids = segment.token_ids.long()
    rewards = {group.prompt.prompt_id: _rewards(group, config) for group in groups}
    mixed = [group for group in groups if len({is_correct(sample) for sample in group.samples}) == 2]
    taken = mixed[: config.rollout.num_prompts]
    for group in taken:
        advantages = ESTIMATORS[config.advantages.estimator](rewards[group.prompt.prompt_id])
        for sample, advantage in zip(group.samples, advantages.tolist(), strict=True):
            sample.advantage = advantage
    samples = [sample for group in taken for sample in group.samples]
    division = divide(
        [sample.num_tokens for sample in samples], [len(group.samples) for group in taken], config, ranks.dp.size()
    )
    return {index: samples[index] for index in division.wanted[ranks.dp.rank()]}


def _rewards(group: Group, config: Config) -> torch.Tensor:
    reward, longest = config.reward, config.rollout.max_response_tokens
    return torch.tensor(
        [
            (reward.correct if is_correct(sample) else reward.incorrect)
            + overlong_penalty(
                sample.num_response_tokens, longest, reward.overlong_buffer_tokens, reward.overlong_penalty
            )
            for sample in group.samples
        ],
        dtype=torch.float64,
    )
