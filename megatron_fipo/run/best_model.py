"""`checkpoint.keep_best`: the model of the best evaluation so far, as a Hugging Face folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

from megatron_fipo.system.disk import write_text_whole

RECORD = "best.json"
"""File in the folder that says which step's model it is, by which metric and value."""


class BestModel:
    """Keeps the best model of a run. Its methods are collective over all ranks, which see the same metrics.

    Args:
        metric: name of the score, higher is better; empty keeps nothing.
        folder: where the model is kept.
        export: writes the weights as they are now into a folder, whole or not at all.
        is_writer: whether this rank writes the record.
    """

    def __init__(self, metric: str, folder: Path, export: Callable[[Path], None], *, is_writer: bool) -> None:
        self._metric, self._folder, self._export, self._is_writer = metric, folder, export, is_writer
        self.value = -math.inf
        self.step = 0

    def state_dict(self) -> dict[str, float]:
        """Return the best value so far, with which a resumed run compares."""
        return {"value": self.value, "step": self.step}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on comparing with a checkpoint's best value."""
        self.value, self.step = state["value"], int(state["step"])

    def note(self, step: int, metrics: Mapping[str, float]) -> str:
        """Compare an evaluation with the best so far; what to tell the user, empty where nothing was kept.

        The model that a run starts from sets the value to beat, and is not kept: it lies where it came from.

        Args:
            step: steps done.

        Raises:
            DiskError: on the rank that writes, after the last collective call.
        """
        value = metrics.get(self._metric, math.nan)
        if not self._metric or not value > self.value:  # NaN is never better
            return ""
        before, self.value, self.step = self.value, value, step
        if step == 0:
            return ""
        self._export(self._folder)
        if self._is_writer:
            record = {"step": step, "metric": self._metric, "value": value}
            write_text_whole(self._folder / RECORD, json.dumps(record, indent=2) + "\n")
        than = f" (before: {before:.3f})" if math.isfinite(before) else ""
        return f"best so far: {self._metric} = {value:.3f} after {step} steps{than}; the model is in {self._folder}"
