"""Dynamic sampling over scripted rounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_fipo.config import SamplingSection
from megatron_fipo.metrics.reductions import scalars
from megatron_fipo.rl.dynamic_sampling import BatchNotFilledError, DynamicSampler
from megatron_fipo.rl.judged_group import JudgedGroup
from tests.unit.rl_samples import make_judged

MIXED, RIGHT, WRONG = (1.0, 0.0), (1.0, 1.0), (0.0, 0.0)
CONFIG = SamplingSection(max_generation_rounds=3)


def ids(groups: list[JudgedGroup]) -> list[int]:
    return [group.prompt_id for group in groups]


def started(num_groups: int, config: SamplingSection = CONFIG, step: int = 0) -> DynamicSampler:
    sampler = DynamicSampler(num_groups, config)
    sampler.start_step(step)
    return sampler


def test_drops_groups_without_a_signal_until_full() -> None:
    sampler = started(3)
    sampler.add_round([make_judged(0, MIXED), make_judged(1, RIGHT), make_judged(2, WRONG), make_judged(3, MIXED)])
    assert (sampler.num_missing, sampler.full, sampler.needs_round) == (1, False, True)
    sampler.add_round([make_judged(4, WRONG), make_judged(5, MIXED)])
    assert (sampler.num_missing, sampler.full, sampler.needs_round) == (0, True, False)
    assert ids(sampler.take()) == [0, 3, 5]
    measured = scalars(sampler.metrics())
    assert measured["rollout/generation_rounds"] == 2
    assert measured["rollout/generated_groups"] == 6
    assert measured["rollout/dropped_groups/all_right_share"] == 1 / 6
    assert measured["rollout/dropped_groups/all_wrong_share"] == 2 / 6
    assert measured["rollout/dropped_groups/failed_share"] == 0


def test_takes_in_prompt_order_whatever_finished_first() -> None:
    sampler = started(2)
    sampler.add_round([make_judged(7, MIXED), make_judged(3, MIXED), make_judged(5, MIXED)])
    assert ids(sampler.take()) == [3, 5]


def test_partial_credit_is_not_right() -> None:
    sampler = started(1)
    sampler.add_round([make_judged(0, (0.4, 0.9))])
    assert sampler.needs_round
    sampler.add_round([make_judged(1, (0.4, 1.0))])
    assert ids(sampler.take()) == [1]
    assert scalars(sampler.metrics())["rollout/dropped_groups/all_wrong_share"] == 0.5


def test_lengths_do_not_make_a_uniform_group_mixed() -> None:
    sampler = started(1)
    group = make_judged(0, WRONG)
    group.rewards = np.array([-1.0, -1.7])
    sampler.add_round([group])
    assert sampler.num_missing == 1


def test_failed_groups_are_dropped_and_named() -> None:
    sampler = started(1)
    sampler.add_round([make_judged(0, MIXED, error="no verdict within 10 s"), make_judged(1, MIXED)])
    assert ids(sampler.take()) == [1]
    measured = scalars(sampler.metrics())
    assert measured["rollout/dropped_groups/failed_share"] == 0.5
    # A failed group counts as failed alone: its accuracies are unknown.
    assert measured["rollout/dropped_groups/all_right_share"] == 0


def test_without_dynamic_sampling_uniform_groups_stay_and_failed_ones_go() -> None:
    sampler = started(2, replace(CONFIG, dynamic=False))
    sampler.add_round([make_judged(0, RIGHT), make_judged(1, MIXED, error="died")])
    assert sampler.needs_round
    sampler.add_round([make_judged(2, WRONG)])
    assert ids(sampler.take()) == [0, 2]


def test_gives_up_when_the_rounds_are_used_up() -> None:
    sampler = started(2)
    for first in (0, 10, 20):
        assert sampler.needs_round
        sampler.add_round([make_judged(first, WRONG), make_judged(first + 1, WRONG), make_judged(first + 2, RIGHT)])
    assert not sampler.needs_round
    with pytest.raises(BatchNotFilledError) as error:
        sampler.take()
    message = str(error.value)
    assert "step 0: 0 of 2 groups after 3 rounds" in message
    assert "Of 9 generated groups 3 were all right, 6 all wrong, 0 failed" in message
    assert "too hard" in message
    assert "too easy" not in message


@pytest.mark.parametrize(
    ("groups", "remedy"),
    [
        ([make_judged(0, RIGHT), make_judged(1, RIGHT)], "too easy"),
        ([make_judged(0, MIXED, error="time-out"), make_judged(1, WRONG)], "failed: arithmetic prompt 0: time-out"),
        ([make_judged(0, MIXED, error="time-out"), make_judged(1, WRONG)], "verifier.timeout_s"),
        ([make_judged(0, MIXED)], "max_generation_rounds"),
    ],
)
def test_the_remedy_fits_the_cause(groups: list[JudgedGroup], remedy: str) -> None:
    sampler = started(2)
    sampler.add_round(groups)
    with pytest.raises(BatchNotFilledError, match=remedy):
        sampler.take()


def test_a_short_batch_where_allowed_but_never_an_empty_one() -> None:
    config = replace(CONFIG, allow_short_batch=True)
    sampler = started(4, config)
    sampler.add_round([make_judged(0, MIXED), make_judged(1, WRONG)])
    assert ids(sampler.take()) == [0]
    empty = started(4, config)
    empty.add_round([make_judged(1, WRONG)])
    with pytest.raises(BatchNotFilledError):
        empty.take()


def test_surplus_is_discarded_by_default() -> None:
    sampler = started(1)
    sampler.add_round([make_judged(0, MIXED), make_judged(1, MIXED)])
    sampler.take()
    sampler.start_step(1)
    assert sampler.num_missing == 1


def test_surplus_is_used_first_and_ages() -> None:
    sampler = started(2, replace(CONFIG, max_surplus_age_steps=1))
    sampler.add_round([make_judged(index, MIXED, step=0) for index in range(5)])
    assert ids(sampler.take()) == [0, 1]
    assert scalars(sampler.metrics())["rollout/surplus_groups/kept"] == 3
    sampler.start_step(1)
    assert sampler.full
    assert not sampler.needs_round
    assert ids(sampler.take()) == [2, 3]
    measured = scalars(sampler.metrics())
    assert measured["rollout/generation_rounds"] == 0
    assert measured["rollout/group_age_steps/max"] == 1
    sampler.start_step(2)
    # Group 4 would be two steps old.
    assert sampler.num_missing == 2
    sampler.add_round([make_judged(6, MIXED, step=2), make_judged(7, MIXED, step=2)])
    assert ids(sampler.take()) == [6, 7]
    measured = scalars(sampler.metrics())
    assert measured["rollout/surplus_groups/expired"] == 1
    assert measured["rollout/group_age_steps/mean"] == 0


def test_surplus_survives_a_checkpoint() -> None:
    config = replace(CONFIG, max_surplus_age_steps=2)
    sampler = started(1, config)
    sampler.add_round([make_judged(index, MIXED, step=0) for index in range(3)])
    sampler.take()
    restored = DynamicSampler(1, config)
    restored.restore(sampler.surplus)
    for one in (sampler, restored):
        one.start_step(1)
    expected, actual = sampler.take()[0], restored.take()[0]
    assert actual is expected
    assert actual.created_at_step == 0
    assert scalars(restored.metrics()) == scalars(sampler.metrics())


def test_refuses_impossible_settings() -> None:
    with pytest.raises(ValueError, match=r"rollout.num_prompts=0"):
        DynamicSampler(0, CONFIG)


def test_tokens_that_nobody_trains_on_are_counted() -> None:
    def unused(sampler: DynamicSampler) -> float:
        return scalars(sampler.metrics())["rollout/unused_tokens"]

    def groups(step: int) -> list[JudgedGroup]:
        lost = make_judged(9, WRONG, step=step, lengths=(1000, 1000))
        return [lost, *(make_judged(index, MIXED, step=step, lengths=(index, 10)) for index in range(1, 4))]

    thrown_away = started(1)
    thrown_away.add_round(groups(0))
    thrown_away.take()
    assert unused(thrown_away) == 12 + 13, "without a signal is not unused"
    kept = started(1, replace(CONFIG, max_surplus_age_steps=1))
    kept.add_round(groups(0))
    kept.take()
    assert unused(kept) == 0
    kept.start_step(2)
    kept.add_round(groups(2))
    kept.take()
    assert unused(kept) == 12 + 13, "they are too old now"
