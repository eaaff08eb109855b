"""How stale tokens must be so that no server waits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_fipo.preflight.plan import Plan
from megatron_fipo.preflight.schedules.outcome import Setup
from megatron_fipo.preflight.schedules.workload import Workload


@dataclass(frozen=True)
class Fill:
    """How stale one must be to fill the servers.

    Attributes:
        servers: number of servers.
        each: responses in flight at each of them when its cache is full, on average.
        needed: responses that a step needs, those that dynamic sampling drops included.
        longest: the longest response, over the mean of all.
    """

    servers: int
    each: int
    needed: float
    longest: float

    @property
    def steps(self) -> float:
        """Responses in flight over those that a step needs."""
        return self.servers * self.each / self.needed

    @property
    def bound(self) -> int:
        """The rollout.max_staleness_steps that does it.

        A step waits for every prompt before the last of its batch. On full servers the longest response takes so many
        steps as all, times its length over the mean: begun that long ahead, it keeps no step waiting.
        """
        return max(math.ceil(self.steps * self.longest), 1)


def filling(plan: Plan, workload: Workload, setup: Setup) -> Fill:
    """How stale one must be to fill the servers of a setup."""
    lengths = workload.lengths
    return Fill(
        servers=setup.num_servers,
        each=setup.decoding.saturated(workload.context),
        needed=plan.batch.samples / workload.kept,
        longest=lengths.longest / lengths.mean,
    )
