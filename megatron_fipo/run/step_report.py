"""A training step's numbers, from its rollouts, its updates and its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron_fipo.actor.trained import UpdateResult
from megatron_fipo.config import Config
from megatron_fipo.metrics.reductions import Last, Metrics, Sum, from_plain, merge, scalars, to_plain
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.agreement import decided_by_leader
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.rl.diagnostics import advantage_metrics, noise_floor, rollout_metrics
from megatron_fipo.rollout.source import StepRollouts

INFLUENCE_STD = "fipo/influence_weight/std"


class StepClock:
    """Seconds that a step and its phases take."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self._ended = 0.0  # seconds of all phases that have ended

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; the same name again adds up. What a phase within it takes is that one's and not its own."""
        started, ended_before = time.perf_counter(), self._ended
        yield
        seconds = time.perf_counter() - started
        within = self._ended - ended_before
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds - within
        self._ended = ended_before + seconds

    def metrics(self, num_tokens: int) -> Metrics:
        """time_s/<phase>, and the throughput of the whole step so far."""
        seconds = {**self._seconds, "step": time.perf_counter() - self._started}
        return {
            "perf/tokens": Sum(num_tokens),
            "perf/tokens_per_s": Last(num_tokens / seconds["step"]),
            **{f"time_s/{name}": Last(value) for name, value in seconds.items()},
        }


def step_metrics(
    rollouts: StepRollouts,
    updates: Sequence[UpdateResult],
    clock: StepClock,
    more: Metrics,
    config: Config,
    ranks: ParallelGroups,
) -> tuple[dict[str, float], str]:
    """Everything about a step as flat numbers, the same on every rank. Collective over all ranks.

    Args:
        rollouts: the step's rollouts; what is known of their responses is on rank 0.
        updates: this rank's results, in order.
        more: further metrics, alike on every rank.

    Returns:
        (numbers by name, a warning where rounding noise dominates Future-KL, else empty).
    """
    first = merge_metrics(updates[0].metrics if ranks.reports_loss else None, ranks.world)
    own_later = merge([result.metrics for result in updates[1:]]) if ranks.reports_loss else None
    later = merge_metrics(own_later, ranks.world)
    later_numbers = scalars(later)
    noise = noise_floor(scalars(first), later_numbers)
    norms = [result.grad_norm for result in updates]
    metrics: Metrics = {
        **merge([first, later]),
        **decided_by_leader(lambda: _rollout_metrics(rollouts, config), ranks.world),
        **noise.metrics,
        "optim/grad_norm": Last(sum(norms) / len(norms)),
        "optim/grad_norm/max": Last(max(norms)),
        "optim/learning_rate": Last(updates[-1].learning_rate),
        "optim/updates": Last(len(updates)),
        **clock.metrics(int(rollouts.plan["num_tokens"].sum())),
        **more,
    }
    numbers = scalars(metrics)
    if INFLUENCE_STD in later_numbers:
        numbers[f"{INFLUENCE_STD}_after_first_update"] = later_numbers[INFLUENCE_STD]
    return numbers, noise.warning


def _rollout_metrics(rollouts: StepRollouts, config: Config) -> Metrics:
    judged = rollouts.judged
    assert judged is not None, "rank 0 has what is known of all responses"
    return {
        **rollout_metrics(judged.generated, config.rollout.max_response_tokens),
        **advantage_metrics(judged.trained_on),
    }


def gather_results(results: Sequence[UpdateResult], ranks: ParallelGroups) -> dict[str, Any]:
    """Every rank's updates of a step so far, for a checkpoint. Collective over all ranks."""
    own = [
        {
            "metrics": to_plain(result.metrics) if ranks.reports_loss else {},
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
        }
        for result in results
    ]
    return {"layout": _layout(ranks), "by_rank": exchange.all_gather_objects(own, ranks.world)}


def restore_results(saved: Mapping[str, Any], ranks: ParallelGroups) -> list[UpdateResult]:
    """This rank's part of what `gather_results` collected. No communication.

    In another layout one rank that reports losses takes all parts, so that each counts once.
    """
    by_rank = saved["by_rank"]
    if saved["layout"] == _layout(ranks):
        parts = [[from_plain(result["metrics"])] for result in by_rank[ranks.rank]]
    else:
        takes_all = ranks.reports_loss and ranks.dp_cp.rank() == 0
        parts = [
            [from_plain(result["metrics"]) for result in update] if takes_all else []
            for update in zip(*by_rank, strict=True)
        ]
    return [
        UpdateResult(merge(list(part)), result["grad_norm"], result["learning_rate"])
        for part, result in zip(parts, by_rank[0], strict=True)
    ]


def _layout(ranks: ParallelGroups) -> list[int]:
    return [ranks.tp.size(), ranks.pp.size(), ranks.cp.size(), ranks.world.size()]
