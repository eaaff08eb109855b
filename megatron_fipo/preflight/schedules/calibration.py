"""Lengths, kept share and speed as a run has measured them, from its metrics.jsonl."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from megatron_fipo.preflight.plan import Plan
from megatron_fipo.preflight.schedules.comparison import (
    ScheduleAssumptions,
    colocated_setup,
    run_own,
    workload_of,
)
from megatron_fipo.preflight.work import Assumptions

STEPS = 20
"""The last steps of the run are taken, so that early, shorter responses do not count."""

QUARTILES = 2 * 0.67449
"""Standard deviations between the quartiles of a normal distribution."""


@dataclass(frozen=True)
class Measured:
    """Means over the last steps of a run.

    Attributes:
        response_tokens: mean length of all generated responses.
        spread: standard deviation of the logarithms of their lengths, by their quartiles.
        kept_share: share of groups with a signal.
        generation: seconds of generation and verification. training: of log-probs and updates.
    """

    response_tokens: float
    spread: float
    kept_share: float
    generation: float
    training: float


def read_run(run: str) -> Measured:
    """Read a run's folder, or its metrics.jsonl itself.

    Raises:
        ValueError: if there is none, a line is damaged, or no step has what is needed.
    """
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--calibrate {run}: {path} cannot be read: {error}. Name the folder of a run.") from error
    steps = [line for line in lines if "rollout/response_tokens/mean" in line and "time_s/update" in line][-STEPS:]
    if not steps:
        raise ValueError(f"--calibrate {run}: {path} has no step with lengths and times. Name a run that has trained.")

    def mean(name: str) -> float:
        try:
            return fmean(float(step[name]) for step in steps)
        except (KeyError, TypeError) as error:
            raise ValueError(f"--calibrate {run}: a step of {path} has no number {name}.") from error

    low, high = (max(mean(f"rollout/response_tokens/{name}"), 1.0) for name in ("p25", "p75"))
    dropped = sum(mean(f"rollout/dropped_groups/{name}_share") for name in ("all_right", "all_wrong", "failed"))
    return Measured(
        response_tokens=mean("rollout/response_tokens/mean"),
        spread=math.log(high / low) / QUARTILES,
        kept_share=1 - dropped,
        generation=mean("time_s/rollout"),
        training=mean("time_s/old_log_probs") + mean("time_s/update"),
    )


def with_lengths(assumptions: Assumptions, measured: Measured) -> Assumptions:
    """Preflight's assumptions with the run's lengths and kept share."""
    if not 0 < measured.kept_share <= 1:
        raise ValueError(f"the run kept {measured.kept_share:.3g} of its groups: there is nothing to simulate.")
    return replace(assumptions, response_tokens=measured.response_tokens, kept_share=measured.kept_share)


def with_speed(plan: Plan, measured: Measured) -> ScheduleAssumptions:
    """The simulation's assumptions such that the run's own schedule takes as long as the run did.

    The run must have had the plan's GPUs, batch and schedule. Every time of generation grows in proportion with the
    factor, so that one simulation finds it. Lengths are spread within and between prompts in the usual proportion.
    """
    usual = ScheduleAssumptions()
    share = measured.spread / math.hypot(usual.between, usual.within)
    spread = replace(usual, between=share * usual.between, within=share * usual.within)
    workload = workload_of(plan, spread)
    steps = run_own(plan, workload, colocated_setup(plan, workload, spread))
    return replace(
        spread,
        generation_factor=measured.generation / fmean(step.generation for step in steps),
        training_factor=measured.training / fmean(step.training for step in steps),
    )
