"""Runs that go on in the next step with what a batch leaves unfinished: repeatable bit for bit, prefixes included,
whatever time anything takes, also after a kill; and no token is staler than the bound allows."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_fipo import train as train_module
from megatron_fipo.environments.single_turn import SingleTurn
from megatron_fipo.rl.trajectory import Prompt
from megatron_fipo.rollout.ledger import RolloutLedger
from megatron_fipo.rollout.ledger_lines import read_lines
from megatron_fipo.rollout.stream import Stream
from tests.end_to_end import kills
from tests.end_to_end.runs import differing, exported_weights, sample_files, step_lines, timeless, trace_files, train
from tests.end_to_end.test_kill import kill

NUM_STEPS, NUM_GROUPS, NUM_SAMPLES = 4, 4, 8
RUN = (
    "sampling.streaming=true",
    "sampling.max_surplus_age_steps=0",
    "rollout.max_staleness_steps=1",
    "rollout.max_batch_size=20",
    f"train.num_steps={NUM_STEPS}",
    "train.resume=true",
    "checkpoint.every_num_steps=2",
    "checkpoint.export_huggingface=true",
)


def _keep_the_ledger() -> None:
    RolloutLedger.forget_before = lambda self, step: None  # type: ignore[method-assign]


def _with_late_verdicts(*, meets: bool = True) -> None:
    """Verdicts come after anything from no time to 30 ms, and the engine's own steps take longer now and then."""
    _keep_the_ledger()
    play, draw = SingleTurn.play, random.Random(7)

    async def late(self: SingleTurn, prompt: Prompt, *others: Any) -> Any:
        trajectory = await play(self, prompt, *others)
        await asyncio.sleep(draw.random() * 0.03)
        return trajectory

    SingleTurn.play = late  # type: ignore[method-assign]
    if not meets:
        original = Stream.__init__

        def without(self: Stream, *args: Any, **keywords: Any) -> None:
            original(self, *args, **keywords | {"meets": False})

        Stream.__init__ = without  # type: ignore[method-assign]


def carried_in(folder: Path, step: int) -> list[dict[str, Any]]:
    """What the ledger says that a step took over."""
    files = sorted((folder / "rollouts" / f"step_{step:06d}").glob("carried_*.jsonl"))
    return [record for file in files for record in read_lines(file) if "fingerprint" not in record]


def plan_of(folder: Path, step: int) -> dict[str, Any]:
    (line,) = (folder / "rollouts" / f"step_{step:06d}" / "plan.json").read_text().splitlines()
    return dict(json.loads(line.partition(" ")[2]))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on two ranks that nothing stops, with all of its ledger."""
    folder = tmp_path_factory.mktemp("carried") / "run"
    train(folder, *RUN, prepare=_keep_the_ledger, expected=0)
    return folder


def assert_same(folder: Path, straight: Path) -> None:
    """Metrics, weights, samples, traces and what was carried are the same bit for bit."""
    assert [timeless(line) for line in step_lines(folder)] == [timeless(line) for line in step_lines(straight)]
    assert differing(exported_weights(folder), exported_weights(straight)) == []
    assert sample_files(folder) == sample_files(straight)
    assert trace_files(folder) == trace_files(straight)
    for step in range(NUM_STEPS - 1, NUM_STEPS + 1):  # the ledger of earlier steps may be gone
        assert carried_in(folder, step) == carried_in(straight, step)


def test_unfinished_responses_go_on(straight: Path) -> None:
    """Each in the place where it was cut, with the tokens, log-probs and versions that it had."""
    num_went_on = 0
    lines = step_lines(straight)
    for step in range(1, NUM_STEPS):
        num_dropped_tokens = 0
        judged = {
            (record["prompt_id"], record["sample_index"]): record
            for file in (straight / "rollouts" / f"step_{step:06d}").glob("rank_*.jsonl")
            for record in read_lines(file)
            if "fingerprint" not in record
        }
        for record in carried_in(straight, step):
            whole = judged.get((record["prompt_id"], record["sample_index"]))
            if step - record["begun_at_step"] > 1:  # it would be too stale
                num_dropped_tokens += sum(count for _, count, _ in record["segments"])
                assert whole is None or whole["segments"] == [["policy", whole["segments"][0][1], step]], "begun anew"
            elif record["is_judged"]:
                assert whole is None, "nothing is generated twice"
            elif whole is not None:
                before, after = record["segments"], whole["segments"]
                assert after[: len(before)] == before
                assert [version for _, _, version in after] == [step - 1, step]
                assert sum(count for _, count, _ in after) > sum(count for _, count, _ in before)
                prefix = record["response_ids"].rstrip("=")  # base64: all but its last letters are its own
                assert whole["response_ids"].startswith(prefix[: len(prefix) // 4 * 4])
                num_went_on += 1
        assert lines[step]["rollout/dropped_tokens"] == num_dropped_tokens
    assert num_went_on >= 5


def test_no_token_is_staler_than_the_bound(straight: Path) -> None:
    lines = step_lines(straight)
    stalest = [line["rollout/staleness_steps/max"] for line in lines]
    assert stalest[0] == 0
    assert max(stalest) == 1
    assert all(line["rollout/carried_tokens"] > 0 for line in lines)
    assert all(line["rollout/unused_tokens"] == 0 for line in lines)


def test_each_prompt_is_used_once_and_in_order(straight: Path) -> None:
    end = 0
    for step in range(NUM_STEPS):
        plan = plan_of(straight, step)
        assert len(plan["prompt_ids"]) == NUM_GROUPS
        assert end <= plan["prompt_ids"][0]
        assert plan["prompt_ids"] == sorted(plan["prompt_ids"])
        end = plan["next_prompt"]
        places = Counter((record["prompt_id"], record["sample_index"]) for record in carried_in(straight, step + 1))
        assert len(places) == plan["num_carried"] > 0
        assert {*places.values()} == {1}
        assert min(places)[0] >= end


def test_time_changes_nothing(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, *RUN, prepare=_with_late_verdicts, expected=0)
    assert_same(folder, straight)


@pytest.mark.ci
def test_without_meetings_time_would_change_it(straight: Path, tmp_path: Path) -> None:
    """The control: a stream that ends as soon as rank 0 knows enough."""
    folder = tmp_path / "run"
    train(folder, *RUN, prepare=partial(_with_late_verdicts, meets=False), expected=0)
    assert carried_in(folder, 1) != carried_in(straight, 1)


@pytest.mark.parametrize(
    "prepare",
    [
        partial(kills.in_stream, step=3, num_samples=9),
        pytest.param(partial(kills.in_update, step=1, num_done=1), marks=pytest.mark.ci),
        pytest.param(partial(kills.in_log_probs, call=3), marks=pytest.mark.ci),
        pytest.param(partial(kills.in_stream, step=1, num_samples=1), marks=pytest.mark.ci),
    ],
    ids=["in a stream after a checkpoint", "among updates", "after its batch was decided", "as its stream begins"],
)
def test_a_killed_run_goes_on_bit_for_bit(prepare: Any, straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill(folder, prepare, *RUN)
    assert len(step_lines(folder)) < NUM_STEPS
    train(folder, *RUN, expected=0)
    assert_same(folder, straight)


@pytest.mark.ci
@pytest.mark.parametrize("number", range(4))
def test_a_run_killed_at_a_random_response(number: int, straight: Path, tmp_path: Path) -> None:
    draw = random.Random(number)
    folder = tmp_path / "run"
    kill(folder, partial(kills.in_stream, step=draw.randrange(NUM_STEPS), num_samples=draw.randint(1, 12)), *RUN)
    train(folder, *RUN, expected=0)
    assert_same(folder, straight)


@pytest.mark.ci
def test_a_signal_in_a_stream_saves_and_leaves(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    signalled = partial(kills.signalled_in_stream, step=2, num_samples=3)
    train(folder, *RUN, prepare=signalled, expected=train_module.EXIT_STOPPED)
    assert len(step_lines(folder)) == 2
    train(folder, *RUN, expected=0)
    assert_same(folder, straight)


@pytest.mark.ci
def test_updates_go_on_without_generation(straight: Path, tmp_path: Path) -> None:
    """Killed by a signal between updates: the batch is taken from its records, carried responses among them."""
    folder = tmp_path / "run"
    signalled = partial(kills.signalled_in_update, step=1, num_done=1)
    train(folder, *RUN, prepare=signalled, expected=train_module.EXIT_STOPPED)
    train(folder, *RUN, "train.num_steps=2", prepare=partial(kills.without_generation, 1), expected=0)
    assert [timeless(line) for line in step_lines(folder)] == [timeless(line) for line in step_lines(straight)][:2]
    assert carried_in(folder, 2) == carried_in(straight, 2)


@pytest.mark.ci
def test_a_run_goes_on_with_other_ranks(tmp_path: Path) -> None:
    """One rank takes over what two have begun."""
    folder = tmp_path / "run"
    longer = (*RUN, "rollout.max_staleness_steps=2")  # nothing is too stale
    train(folder, *longer, "train.num_steps=2", prepare=_keep_the_ledger, expected=0)
    (outcome,) = train(folder, *longer, "train.num_steps=3", world_size=1, prepare=_keep_the_ledger, expected=0)
    assert "begun anew" not in outcome.said
    assert len(step_lines(folder)) == 3
    taken_over = {(one["prompt_id"], one["sample_index"]) for one in carried_in(folder, 2) if one["is_judged"]}
    generated = {
        (record["prompt_id"], record["sample_index"])
        for file in (folder / "rollouts" / "step_000002").glob("rank_*.jsonl")
        for record in read_lines(file)
        if "fingerprint" not in record
    }
    assert taken_over
    assert not taken_over & generated
    assert step_lines(folder)[2]["rollout/staleness_steps/max"] in (1, 2)
    assert step_lines(folder)[2]["rollout/dropped_tokens"] == 0


@pytest.mark.ci
def test_what_is_lost_of_the_ledger_is_begun_anew_and_told(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train(folder, *RUN, "train.num_steps=2", expected=0)
    shutil.rmtree(folder / "rollouts")
    first, _ = train(folder, *RUN, "train.num_steps=3", expected=0)
    num_lost = plan_of(straight, 1)["num_carried"]
    assert f"step 2: {num_lost} responses that were to go on are not recorded any more" in first.said
    assert step_lines(folder)[2]["rollout/staleness_steps/max"] == 0
