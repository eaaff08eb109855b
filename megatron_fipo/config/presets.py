"""The algorithms, the other keys that each sets, and defaults that follow from other keys."""

from __future__ import annotations

from typing import Any

ALGORITHMS: dict[str, dict[str, Any]] = {
    "fipo": {"objective": {"future_kl": True}},
    "dapo": {"objective": {"future_kl": False}},
    "grpo": {
        "objective": {"future_kl": False, "clip_ratio_high": 0.2, "dual_clip": None},
        "sampling": {"dynamic": False},
    },
    "grpo_sequence_mean": {
        "objective": {
            "future_kl": False,
            "clip_ratio_high": 0.2,
            "dual_clip": None,
            "loss_aggregation": "sequence_mean",
        },
        "sampling": {"dynamic": False},
    },
    "dr_grpo": {
        "objective": {
            "future_kl": False,
            "clip_ratio_high": 0.2,
            "dual_clip": None,
            "loss_aggregation": "sequence_sum",
        },
        "advantages": {"estimator": "group_mean"},
        "sampling": {"dynamic": False},
    },
    "rloo": {
        "objective": {"future_kl": False},
        "advantages": {"estimator": "leave_one_out"},
        "sampling": {"dynamic": False},
    },
}
"""What each algorithm sets; a key the user sets wins, except where `validate` names a contradiction."""


def correction_by_default(max_staleness_steps: int, old_log_probs: str) -> str:
    """objective.rollout_correction where no file and no override names it.

    Stale tokens have another author than the old policy, and each is weighed by how likely that policy is to write it.
    Where the old log-probs are the engine's own there is nothing to correct.

    Args:
        max_staleness_steps: rollout.max_staleness_steps.
        old_log_probs: objective.old_log_probs.
    """
    return "token_truncated" if max_staleness_steps > 0 and old_log_probs == "actor" else "none"
