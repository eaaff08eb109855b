"""`train.stop_when`: a metric and a bound at which a run has come to its end."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

_RULE = re.compile(r"\s*(?P<metric>\S+?)\s*(?P<comparison>>=|<=)\s*(?P<bound>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")


@dataclass(frozen=True)
class StopRule:
    """A bound on a metric.

    Attributes:
        metric: its name in metrics.jsonl.
        is_lower_bound: met by values of at least `bound`; else by those of at most `bound`.
    """

    metric: str
    is_lower_bound: bool
    bound: float

    @staticmethod
    def parse(text: str) -> StopRule:
        """Read "evaluation/held_out/avg@32 >= 0.9" or "policy/kl/mean <= 0.01".

        Raises:
            ValueError: for anything else.
        """
        match = _RULE.fullmatch(text)
        try:
            bound = float(match["bound"]) if match else math.nan
        except ValueError:  # "1.2.3"
            bound = math.nan
        if match is None or math.isnan(bound):
            raise ValueError(
                "must be a metric, >= or <=, and a number, such as 'evaluation/held_out/avg@32 >= 0.9'; the metrics "
                "are those of metrics.jsonl"
            )
        return StopRule(match["metric"], match["comparison"] == ">=", bound)

    def is_met(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metric is among these and at or beyond its bound; NaN never is."""
        value = metrics.get(self.metric, math.nan)
        return value >= self.bound if self.is_lower_bound else value <= self.bound
