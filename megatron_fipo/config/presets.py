"""The algorithms, and the other keys that each sets."""

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
