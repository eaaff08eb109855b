"""The batch of a step that streams: full in the order of prompts, whatever finishes first and wherever."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.config import SamplingSection, num_groups_ahead, num_groups_to_begin
from megatron_fipo.rl.dynamic_sampling import DynamicSampler
from megatron_fipo.rl.judged_group import JudgedGroup
from megatron_fipo.rl.prompt_order import FreshSamples, KeptShare, PromptOrderBooks
from tests.unit.rl_samples import make_judged

NUM_SAMPLES, NUM_GROUPS = 4, 5
SAMPLER = DynamicSampler(NUM_GROUPS, SamplingSection())


def response(prompt_id: int, sample_index: int, score: float, length: int, leader: int = 0) -> JudgedGroup:
    """One response to a prompt, as rank 0 hears of it."""
    one = make_judged(prompt_id, (score,), lengths=(length,))
    one.rows["sample_index"], one.rows["leader"] = sample_index, leader
    return one


def books(prompts: range, known: KeptShare = KeptShare(), *, is_adaptive: bool = True) -> PromptOrderBooks:  # noqa: B008
    return PromptOrderBooks(prompts, NUM_SAMPLES, NUM_GROUPS, SAMPLER.is_kept, known, is_adaptive=is_adaptive)


def used(found: PromptOrderBooks) -> list[int]:
    return [group.prompt_id for group in found.groups()]


Scores = dict[int, list[float]]


def streamed(
    scores: Scores,
    lengths: dict[tuple[int, int], int],
    slots: list[int],
    kind: type[PromptOrderBooks] = PromptOrderBooks,
) -> PromptOrderBooks:
    """Decode as servers with so many slots each do: claims in the order of prompts, each response for its length."""
    found = kind(range(len(scores)), NUM_SAMPLES, NUM_GROUPS, SAMPLER.is_kept)
    waiting = [(prompt_id, index) for prompt_id in scores for index in range(NUM_SAMPLES)]
    running: list[tuple[int, tuple[int, int], int]] = []
    now = 0
    while not found.is_over:
        free = [server for server, count in enumerate(slots) for _ in range(count)]
        for _, _, server in running:
            free.remove(server)
        while free and waiting:
            key, server = waiting.pop(0), free.pop(0)
            running.append((now + lengths[key], key, server))
        running.sort()
        now, (prompt_id, index), server = running.pop(0)
        found.add(response(prompt_id, index, scores[prompt_id][index], lengths[prompt_id, index], server))
    return found


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), slots=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_the_batch_is_the_same_for_any_servers_and_lengths(seed: int, slots: list[int]) -> None:
    draw = random.Random(seed)
    scores = {prompt_id: [float(draw.random() < 0.6) for _ in range(NUM_SAMPLES)] for prompt_id in range(30)}
    lengths = {(prompt_id, index): draw.randint(1, 400) for prompt_id in scores for index in range(NUM_SAMPLES)}
    expected, num_kept = [], 0
    for prompt_id, of_prompt in scores.items():
        if num_kept == NUM_GROUPS:
            break
        expected.append(prompt_id)
        num_kept += len({*of_prompt}) == 2
    found = streamed(scores, lengths, slots)
    assert used(found) == expected
    assert found.next_prompt == len(expected)
    for group in found.groups():
        assert group.rows["sample_index"].tolist() == list(range(NUM_SAMPLES))
        assert group.rows["score"].tolist() == scores[group.prompt_id]


class FirstToFinish(PromptOrderBooks):
    """The naive rule: the first groups to finish fill the batch."""

    finished: list[JudgedGroup]

    def add(self, part: JudgedGroup) -> None:
        if not hasattr(self, "finished"):
            self.finished = []
        before = {*self._whole}
        super().add(part)
        self.finished += [self._whole[prompt_id] for prompt_id in {*self._whole} - before]

    @property
    def is_over(self) -> bool:
        return sum(map(SAMPLER.is_kept, getattr(self, "finished", []))) >= NUM_GROUPS

    def groups(self) -> list[JudgedGroup]:
        return self.finished


def mean_length(groups: list[JudgedGroup]) -> float:
    lengths = [length for group in groups if SAMPLER.is_kept(group) for length in group.rows["num_tokens"].tolist()]
    return sum(lengths) / len(lengths)


def test_the_first_to_finish_would_be_the_short_ones() -> None:
    """The control: with more slots than a batch, and lengths spread over 20 times, that batch is a third shorter."""

    def mean_lengths(kind: type[PromptOrderBooks]) -> float:
        of_steps = []
        for seed in range(40):
            draw = random.Random(seed)
            scores = {prompt_id: draw.sample([1.0, 0.0, 1.0, 0.0], NUM_SAMPLES) for prompt_id in range(30)}
            typical = {prompt_id: draw.lognormvariate(4.0, 0.7) for prompt_id in scores}
            lengths = {
                (prompt_id, index): max(1, round(typical[prompt_id] * draw.lognormvariate(0.0, 0.4)))
                for prompt_id in scores
                for index in range(NUM_SAMPLES)
            }
            of_steps.append(mean_length(streamed(scores, lengths, [20, 20, 20], kind).groups()))
        return sum(of_steps) / len(of_steps)

    assert mean_lengths(FirstToFinish) < 0.67 * mean_lengths(PromptOrderBooks)


def test_a_step_without_enough_groups_ends_at_its_last_prompt() -> None:
    found = books(range(3, 6))
    for prompt_id in (5, 3, 4):
        for index in range(NUM_SAMPLES):
            assert not found.is_over
            found.add(response(prompt_id, index, 1.0, 5))
    assert found.is_over
    assert used(found) == [3, 4, 5]
    assert found.next_prompt == 6


def test_what_comes_twice_or_from_nowhere_is_refused() -> None:
    found = books(range(3))
    found.add(response(1, 2, 1.0, 5))
    for prompt_id, index in ((1, 2), (3, 0)):
        with pytest.raises(ValueError, match="each of them once"):
            books_with(found, response(prompt_id, index, 0.0, 5))
    whole = books(range(3))
    for index in range(NUM_SAMPLES):
        whole.add(response(0, index, 1.0, 5))
    with pytest.raises(ValueError, match="each of them once"):
        whole.add(response(0, 0, 1.0, 5))


def books_with(found: PromptOrderBooks, part: JudgedGroup) -> PromptOrderBooks:
    """The books with a further response, none the worse where that is refused."""
    copy = books(range(3))
    for parts in found._parts.values():
        for one in parts:
            copy.add(replace(one))
    copy.add(part)
    return copy


def test_tokens_that_nobody_uses_are_counted() -> None:
    found = books(range(30))
    for prompt_id in range(NUM_GROUPS):
        for index in range(NUM_SAMPLES):
            if (prompt_id, index) != (0, 0):
                found.add(response(prompt_id, index, float(index % 2), 10))
    found.add(response(7, 1, 1.0, 1000))
    for index in range(NUM_SAMPLES):
        found.add(response(8, index, 1.0, 100))
    assert not found.is_over
    found.add(response(0, 0, 0.0, 10))
    assert found.is_over
    assert found.num_tokens_beyond == 1000 + 400


# --- how many are begun ----------------------------------------------------------------------------------------------


def test_no_more_are_begun_than_are_likely_to_be_needed() -> None:
    assert num_groups_to_begin(512, 1.0) == 512
    assert num_groups_to_begin(512, 0.5) == 1088  # 1024 and two standard deviations, of 32
    assert num_groups_to_begin(0, 0.5) == 0
    assert KeptShare().share() == 1.0
    known = KeptShare().after(5, 10)
    assert known.share() == 0.5
    assert known.after(0, 100).share() < 0.05
    assert KeptShare(0.0, 50.0).share() > 0, "never none: otherwise nothing would be begun"


def test_at_most_one_step_in_twenty_needs_a_second_go() -> None:
    draw = random.Random(0)
    begun = num_groups_to_begin(64, 0.5)
    short = sum(sum(draw.random() < 0.5 for _ in range(begun)) < 64 for _ in range(2000))
    assert short / 2000 < 0.05


def test_no_more_are_begun_ahead_than_the_coming_steps_take() -> None:
    assert num_groups_ahead(512, 1.0, 1) == 1024
    assert num_groups_ahead(512, 0.5, 0) == 960  # 1024, less two standard deviations, of 32
    assert num_groups_ahead(128, 0.5, 3) == 960  # as many for four steps
    assert num_groups_ahead(512, 0.5, 1) == 1957  # 2048 - 90.51
    assert num_groups_ahead(1, 0.1, 0) == 0, "a standard deviation is more than the one group"
    assert num_groups_ahead(512, 0.5, 0) < 1024 < num_groups_to_begin(512, 0.5), "one errs to this side, one to that"


def test_at_most_one_step_in_twenty_keeps_more_than_the_coming_steps_take() -> None:
    draw = random.Random(0)

    def share_above(begun: int) -> float:
        return sum(sum(draw.random() < 0.5 for _ in range(begun)) > 128 for _ in range(2000)) / 2000

    assert share_above(num_groups_ahead(64, 0.5, 1)) < 0.05
    assert share_above(2 * 128) > 0.4, "the control: as many as are needed on average"


def test_more_are_begun_when_all_are_judged_and_the_batch_is_not_full() -> None:
    found = books(range(100), KeptShare(10.0, 10.0), is_adaptive=False)
    assert found.num_to_begin == NUM_GROUPS
    for prompt_id in range(NUM_GROUPS):
        for index in range(NUM_SAMPLES):
            assert found.num_to_begin == NUM_GROUPS, "not before: it would depend on what ends first"
            found.add(response(prompt_id, index, float(prompt_id == 0 and index == 0), 10))
    assert NUM_GROUPS < found.num_to_begin < 30


def test_servers_are_given_more_while_others_are_in_flight() -> None:
    found = books(range(100), KeptShare(10.0, 10.0))
    for index in range(NUM_SAMPLES):
        found.add(response(3, index, 1.0, 10))
    assert found.num_to_begin > NUM_GROUPS, "one of the five gave nothing"
    begun = found.num_to_begin
    for index in range(NUM_SAMPLES):
        found.add(response(1, index, float(index % 2), 10))
    assert found.num_to_begin >= begun, "never fewer: they may be in flight"


def test_no_more_than_there_are_prompts() -> None:
    assert books(range(3), KeptShare(1.0, 100.0)).num_to_begin == 3


# --- responses that earlier steps have begun --------------------------------------------------------------------------


def test_fresh_samples_are_those_that_nobody_has_begun() -> None:
    begun = {(3, 1), (4, 0), (4, 1), (4, 2), (4, 3), (6, 2)}
    fresh = FreshSamples(3, NUM_SAMPLES, begun)
    expected = [(3, 0), (3, 2), (3, 3), *((5, index) for index in range(4)), (6, 0), (6, 1), (6, 3)]
    assert [fresh.at(place) for place in range(len(expected))] == expected
    assert [fresh.num_until(number) for number in (0, 1, 2, 3, 4)] == [0, 3, 3, 7, 10]
    assert fresh.at(10) == (7, 0)
    assert [FreshSamples(3, NUM_SAMPLES, begun).at(place) for place in (9, 0)] == [(6, 3), (3, 0)], "asked in any order"


def test_prompts_are_begun_ahead_as_far_as_they_may_wait() -> None:
    """By what earlier steps say: the first few groups that a step judges move what it needs, not what it may begin."""
    known = KeptShare(kept=50, used=100)

    def begun(num_steps_ahead: int) -> PromptOrderBooks:
        return PromptOrderBooks(
            range(100), NUM_SAMPLES, NUM_GROUPS, SAMPLER.is_kept, known, num_steps_ahead=num_steps_ahead
        )

    assert begun(0).num_to_begin == num_groups_to_begin(NUM_GROUPS, 0.5)
    assert begun(4).num_to_begin == num_groups_ahead(NUM_GROUPS, 0.5, 4) > begun(0).num_to_begin
    found = begun(4)
    for index in range(NUM_SAMPLES):
        found.add(response(0, index, 1.0, 5))
    assert found.num_to_begin == begun(4).num_to_begin
    assert begun(10**6).num_to_begin == 100, "no more than there are"
