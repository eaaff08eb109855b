"""Chooses the groups of a training step whose tokens are traced."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.system.digests import hashed_seed


def choose_groups(
    groups: Sequence[JudgedGroup], first_minibatch: int, count: int, max_tokens: int, seed: int, step: int
) -> list[int]:
    """Choose groups of a step, whole: the same for the same groups, whatever the layout.

    Groups with right and wrong responses come before others, and those of later minibatches before those of the first
    one, whose shifts are noise in a step's first update. Among equals the seed decides.

    Args:
        groups: the step's groups, in the order of its batch.
        first_minibatch: how many groups the first minibatch has; 0 where a later epoch sees them again.
        count: how many groups to choose, at most.
        max_tokens: response tokens of all chosen groups together, at most; the first one is chosen whatever it has.

    Returns:
        Their places in the batch, ascending.
    """
    shuffled = np.random.default_rng(hashed_seed(seed, step)).permutation(len(groups)).tolist()
    chosen: list[int] = []
    left = max_tokens
    for place in sorted(shuffled, key=lambda place: (not _is_mixed(groups[place]), place < first_minibatch)):
        num_tokens = int(groups[place].rows["num_tokens"].sum())
        if len(chosen) < count and (num_tokens <= left or not chosen):
            chosen.append(place)
            left -= num_tokens
    return sorted(chosen)


def _is_mixed(group: JudgedGroup) -> bool:
    return 0 < int(group.is_right.sum()) < len(group.rows)
