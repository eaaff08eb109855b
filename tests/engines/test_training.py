"""Whole training runs with their rollouts from real servers: two context-parallel ranks, the quick-start's model."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_fipo.parallel.local_ranks import RankError
from megatron_fipo.rollout.ledger import RolloutLedger
from tests.end_to_end import kills
from tests.end_to_end.runs import processes_of, step_lines, train
from tests.engines.environments import server_python

SAMPLES_A_STEP = 32
PATIENCE_S = 600.0


def run(folder: Path, engine: str, *overrides: str, **keywords: object) -> None:
    """Train three steps of two updates on a server of its own."""
    train(
        folder,
        "train.num_steps=3",
        "train.resume=true",
        f"rollout.engine={engine}",
        f"servers.python={server_python(engine)}",
        "sampling.dynamic=false",  # one round a step, so that responses can be counted
        *overrides,
        timeout_s=PATIENCE_S,
        **keywords,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    "engine", [pytest.param("sglang", marks=pytest.mark.sglang), pytest.param("vllm", marks=pytest.mark.vllm)]
)
def test_three_steps_of_fipo(engine: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(folder, engine, "optimizer.num_warmup_steps=1", "optimizer.learning_rate=1e-3", expected=0)
    lines = step_lines(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        # The server's log-probs are the actor's, with the weights of this very step: at this learning rate those of
        # the step before would be off by far more.
        assert line["mismatch/log_prob_difference/absmax"] < 1e-4
        assert line["canary/log_prob_difference/max"] < 1e-4
        assert line["canary/cached_tokens/after"] == 0
        if line["step"] > 0:  # vLLM's cache on the CPU has no block as short as these prompts and responses
            assert (line["canary/cached_tokens/before"] > 0) == (engine == "sglang")
        assert line["weight_sync/transfer_s"] > 0
        assert line["rollout/requests_resent"] == 0
        assert line["time_s/rollout_slowest_sample"] > 0
        assert line["fipo/influence_weight/std"] > 0
    assert processes_of(str(folder)) == {}, "the server was left running"
    assert list((folder / "servers").rglob("*.log")), "the server's log lies beside the run"


def _recorded(folder: Path) -> list[tuple[int, int, int]]:
    """(round, prompt, sample) of every response in step 1's ledger."""
    lines = [
        json.loads(line.partition(" ")[2])
        for file in (folder / "rollouts" / "step_000001").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    return [(line["round"], line["prompt_id"], line["sample_index"]) for line in lines if "prompt_id" in line]


@pytest.mark.sglang
@pytest.mark.long
def test_a_killed_run_keeps_the_responses_that_are_there(tmp_path: Path) -> None:
    """In the middle of a rollout: what is recorded stays, what is missing is generated, nothing twice."""
    folder = tmp_path / "run"
    with pytest.raises(RankError):
        run(folder, "sglang", prepare=partial(kills.in_rollout, step=1, num_samples=5))
    before = _recorded(folder)
    assert 5 <= len(before) < SAMPLES_A_STEP
    deadline = time.monotonic() + 60
    while left := processes_of(str(folder)):
        assert time.monotonic() < deadline, f"a killed run's server lives on: {left}"
        time.sleep(0.1)
    run(folder, "sglang", "train.num_steps=2", prepare=_keep_the_ledger, expected=0)
    after = _recorded(folder)
    assert len(after) == len(set(after)) == SAMPLES_A_STEP, "every response once"
    assert set(before) <= set(after)
    assert len(step_lines(folder)) == 2


def _keep_the_ledger() -> None:
    RolloutLedger.forget_before = lambda self, step: None  # type: ignore[method-assign]
