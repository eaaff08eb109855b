"""Seconds of a step's phases."""

from __future__ import annotations

import pytest

from megatron_fipo.metrics.reductions import scalars
from megatron_fipo.run import step_report
from megatron_fipo.run.step_report import StepClock


def test_a_phase_within_another_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_report.time, "perf_counter", lambda: now[0])
    clock = StepClock()

    def passes(seconds: float) -> None:
        now[0] += seconds

    with clock.phase("rollout"):
        passes(5)
    for seconds in (1, 2):
        with clock.phase("update"):
            passes(seconds)
            for _ in range(2):
                with clock.phase("trace"):
                    passes(0.25)
            passes(seconds)
    passes(0.5)
    told = scalars(clock.metrics(100))
    assert told["time_s/rollout"] == 5
    assert told["time_s/update"] == 6
    assert told["time_s/trace"] == 1
    assert told["time_s/step"] == 12.5
    assert told["perf/tokens_per_s"] == 100 / 12.5
