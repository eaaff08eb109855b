"""`train.stop_when` in the course of a run: whether a rule has ended it, and which."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_fipo.config import StopRule


class Ending:
    """Watches the metrics for the one at which the run ends.

    Args:
        rule: the value of train.stop_when; empty ends nothing.
        metrics_file: named in errors.
        say: tells the user.
    """

    def __init__(self, rule: str, metrics_file: Path, say: Callable[[str], None]) -> None:
        self._text, self._metrics_file, self._say = rule, metrics_file, say
        self._rule = StopRule.parse(rule) if rule else None
        self.ended_by = ""
        """The rule, once it is met."""

    def restore(self, ended_by: str) -> None:
        """Go on from a checkpoint. Another rule, or none, lets a run that had ended go on."""
        self.ended_by = self._text if ended_by == self._text else ""

    def note_scores(self, scores: Mapping[str, float], num_steps: int) -> None:
        """See whether an evaluation's scores meet the rule. They need not hold the rule's metric."""
        if self._rule is not None and self._rule.metric in scores:
            self.note_step(scores, num_steps)

    def note_step(self, metrics: Mapping[str, float], num_steps: int) -> None:
        """See whether the metrics of a step meet the rule.

        Args:
            num_steps: number of steps that are done.

        Raises:
            ValueError: if steps have no such metric.
        """
        rule = self._rule
        if rule is None or self.ended_by:
            return
        if rule.metric not in metrics and not rule.metric.startswith("evaluation/"):
            nearest = difflib.get_close_matches(rule.metric, metrics, n=3, cutoff=0.4)
            raise ValueError(
                f"train.stop_when={self._text}: a step of this run has no metric {rule.metric}. "
                f"Its metrics are in {self._metrics_file}" + f"; near are {', '.join(nearest)}." * bool(nearest)
            )
        if rule.is_met(metrics):
            self.ended_by = self._text
            self._say(
                f"train.stop_when={self._text}: {rule.metric} is {metrics[rule.metric]:g} after {num_steps} steps, "
                "and the run ends here"
            )
