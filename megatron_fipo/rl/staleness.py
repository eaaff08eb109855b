"""How old the weights were that wrote the tokens of a batch: docs/staleness.md."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_fipo.metrics.reductions import Max, Mean, Metrics
from megatron_fipo.rl.trajectory import Trajectory

STALENESS = "rollout/staleness_steps/"


def staleness_metrics(samples: Iterable[Trajectory], version: int) -> Metrics:
    """Mean and largest staleness, in versions, over the tokens whose policy's version is known; none without any.

    Args:
        samples: what is trained on.
        version: of the policy that trains on it.
    """
    ages = [(version - written_by, end - first) for one in samples for written_by, first, end in one.policy_versions]
    num_tokens = sum(count for _, count in ages)
    if not num_tokens:
        return {}
    return {
        STALENESS + "mean": Mean(sum(age * count for age, count in ages), num_tokens),
        STALENESS + "max": Max(max(age for age, _ in ages)),
    }
