"""Minibatches, microbatches and predictor-aligned packing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_fipo.config import BatchSection, Config, TrainSection
from megatron_fipo.parallel.batch import divide
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packing import FILLER, build_packed_batch, pack, split_minibatches
from tests.unit.rl_samples import make_sample


def padded(length: int, multiple: int) -> int:
    return (length + multiple - 1) // multiple * multiple


@pytest.mark.parametrize(
    ("num_groups", "num_minibatches", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (7, 3, [2, 2, 3]), (5, 1, [5]), (2, 4, [1, 1])],
)
def test_minibatches_are_whole_groups_in_order(num_groups: int, num_minibatches: int, sizes: list[int]) -> None:
    minibatches = split_minibatches(num_groups, num_minibatches)
    assert [len(minibatch) for minibatch in minibatches] == sizes
    assert list(itertools.chain(*minibatches)) == list(range(num_groups))


@pytest.mark.parametrize(("num_groups", "num_minibatches"), [(0, 4), (4, 0)])
def test_minibatches_of_nothing(num_groups: int, num_minibatches: int) -> None:
    with pytest.raises(ValueError, match=f"cannot cut {num_groups} groups into {num_minibatches}"):
        split_minibatches(num_groups, num_minibatches)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=60),
    num_ranks=st.integers(1, 5),
    pad_multiple=st.sampled_from([1, 4, 16]),
    slack=st.integers(0, 200),
    microbatch_multiple=st.integers(1, 3),
)
def test_pack_keeps_its_promises(
    lengths: list[int], num_ranks: int, pad_multiple: int, slack: int, microbatch_multiple: int
) -> None:
    sizes = [padded(length, pad_multiple) for length in lengths]
    max_tokens = max(sizes, default=pad_multiple) + slack
    ranks = pack(lengths, num_ranks, max_tokens, pad_multiple, microbatch_multiple)
    assert len(ranks) == num_ranks
    placed = [index for rank in ranks for microbatch in rank for index in microbatch]
    assert sorted(placed) == list(range(len(lengths)))
    assert len({len(rank) for rank in ranks}) == 1
    assert len(ranks[0]) % microbatch_multiple == 0
    assert len(ranks[0]) >= 1
    assert all(sum(sizes[index] for index in microbatch) <= max_tokens for rank in ranks for microbatch in rank)
    loads = [sum(sizes[index] for microbatch in rank for index in microbatch) for rank in ranks]
    # Longest first to the emptiest: no two loads differ by more than one sequence.
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert ranks == pack(lengths, num_ranks, max_tokens, pad_multiple, microbatch_multiple)


def test_pack_balances_ranks_and_microbatches() -> None:
    lengths = [100, 90, 80, 70, 60, 50, 40, 30]
    ranks = pack(lengths, num_ranks=2, max_tokens=140, pad_multiple=1)
    assert [sum(lengths[index] for microbatch in rank for index in microbatch) for rank in ranks] == [260, 260]
    assert [[sum(lengths[index] for index in microbatch) for microbatch in rank] for rank in ranks] == [
        [130, 130],
        [130, 130],
    ]


def test_pack_uses_no_more_microbatches_than_it_needs() -> None:
    assert len(pack([10] * 8, num_ranks=2, max_tokens=40, pad_multiple=1)[0]) == 1
    assert len(pack([10] * 9, num_ranks=2, max_tokens=40, pad_multiple=1)[0]) == 2


def test_pack_where_balance_does_not_fit_but_best_fit_does() -> None:
    # Longest first to the emptiest makes 5 + 2 + 2 = 9 of these; 5 + 3 and 4 + 2 + 2 fit.
    (microbatches,) = pack([5, 4, 3, 2, 2], num_ranks=1, max_tokens=8, pad_multiple=1)
    assert microbatches == [[0, 2], [1, 3, 4]]


def test_pack_with_fewer_sequences_than_ranks() -> None:
    assert pack([5], num_ranks=3, max_tokens=8, pad_multiple=4) == [[[0]], [[]], [[]]]
    assert pack([], num_ranks=2, max_tokens=8, pad_multiple=4, microbatch_multiple=2) == [[[], []], [[], []]]


def test_pack_names_the_sequence_that_does_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"sequence 1 has 97 tokens, 104 padded to a multiple of 8.*=100.*at least 104"
    ):
        pack([50, 97], num_ranks=1, max_tokens=100, pad_multiple=8)


@pytest.mark.parametrize("arguments", [([0], 1, 8, 1), ([4], 0, 8, 1), ([4], 1, 8, 0), ([4], 1, 8, 1, 0)])
def test_pack_refuses_sizes_below_one(arguments: tuple[object, ...]) -> None:
    with pytest.raises(ValueError, match="must be at least 1; the smallest is 0"):
        pack(*arguments)  # type: ignore[arg-type]


def rows(batch: PackedBatch, sequence: int) -> slice:
    return slice(int(batch.cu_seqlens_padded[sequence]), int(batch.cu_seqlens_padded[sequence + 1]))


def test_packing_is_predictor_aligned() -> None:
    """Prompt 100 101 102, response 200 201: the row of token 102 predicts 200, that of 200 predicts 201."""
    samples = [make_sample(9), make_sample(2, 3, advantage=-0.5), make_sample(1, 1, advantage=2.0)]
    batch = build_packed_batch(samples, [1, 2], pad_multiple=4, pad_token_id=7)
    assert batch.input_ids.tolist() == [100, 101, 102, 200, 201, 7, 7, 7, 100, 200, 7, 7]
    assert batch.labels.tolist() == [101, 102, 200, 201, 0, 0, 0, 0, 200, 0, 0, 0]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]
    assert batch.response_mask.nonzero().flatten().tolist() == [2, 3, 8]
    assert batch.advantages.tolist() == [0, 0, -0.5, -0.5, 0, 0, 0, 0, 2.0, 0, 0, 0]
    assert batch.rollout_log_probs.tolist() == [0, 0, -0.125, -0.25, 0, 0, 0, 0, -0.125, 0, 0, 0]
    assert batch.layout.cu_seqlens.tolist() == [0, 5, 7]
    assert batch.layout.cu_seqlens_padded.tolist() == batch.cu_seqlens_padded.tolist() == [0, 8, 12]
    assert batch.layout.num_tokens == 12
    assert batch.sequence_ids.tolist() == [0] * 8 + [1] * 4
    assert batch.response_token_counts.tolist() == [2, 1]
    assert batch.sample_indices == [1, 2]
    assert batch.cu_seqlens_padded.dtype == torch.int32
    assert batch.layout.cu_seqlens.dtype == batch.layout.cu_seqlens_padded.dtype == torch.int64
    assert batch.response_token_counts.dtype == batch.labels.dtype == torch.int64


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=6),
    pad_multiple=st.sampled_from([1, 2, 8]),
)
def test_every_response_token_is_predicted_once(sizes: list[tuple[int, int]], pad_multiple: int) -> None:
    samples = [make_sample(response, prompt) for prompt, response in sizes]
    batch = build_packed_batch(samples, range(len(samples)), pad_multiple, pad_token_id=0)
    for index, sample in enumerate(samples):
        part = rows(batch, index)
        assert torch.equal(batch.labels[part][batch.response_mask[part]], sample.response_ids)
        predictors = batch.input_ids[part][batch.response_mask[part]]
        whole = torch.cat([sample.prompt_ids, sample.response_ids])
        assert torch.equal(predictors, whole[len(sample.prompt_ids) - 1 : -1][: len(sample.response_ids)])
    assert not (batch.cu_seqlens_padded.diff() % pad_multiple).any()


def test_nothing_to_pack_gives_one_filler_sequence() -> None:
    batch = build_packed_batch([make_sample()], [], pad_multiple=8, pad_token_id=3)
    assert batch.input_ids.tolist() == [3] * 8
    assert batch.sample_indices == [FILLER]
    assert not batch.response_mask.any()
    assert batch.layout.cu_seqlens.tolist() == batch.cu_seqlens_padded.tolist() == [0, 8]


def test_total_tokens_adds_a_filler_sequence() -> None:
    samples = [make_sample(4)]
    batch = build_packed_batch(samples, [0], pad_multiple=4, pad_token_id=3, total_tokens=16)
    assert batch.cu_seqlens_padded.tolist() == [0, 8, 16]
    assert batch.sample_indices == [0, FILLER]
    assert batch.response_token_counts.tolist() == [4, 0]
    exact = build_packed_batch(samples, [0], pad_multiple=4, pad_token_id=3, total_tokens=8)
    assert exact.sample_indices == [0]
    for total in (4, 14):
        with pytest.raises(ValueError, match=f"8 padded tokens do not fit into total_tokens={total}"):
            build_packed_batch(samples, [0], pad_multiple=4, pad_token_id=3, total_tokens=total)


def test_truncated_responses_can_be_masked() -> None:
    samples = [make_sample(3, advantage=1.0, finish_reason="length"), make_sample(2, advantage=1.0)]
    batch = build_packed_batch(samples, [0, 1], pad_multiple=1, pad_token_id=0, mask_truncated=True)
    assert batch.response_token_counts.tolist() == [0, 2]
    assert not batch.response_mask[rows(batch, 0)].any()
    assert int(batch.response_mask.sum()) == 2
    # The engine's log-probs stay: they are compared with the actor's.
    assert int((batch.rollout_log_probs != 0).sum()) == 5
    unmasked = build_packed_batch(samples, [0, 1], pad_multiple=1, pad_token_id=0)
    assert unmasked.response_token_counts.tolist() == [3, 2]


def test_a_prompt_needs_a_token() -> None:
    with pytest.raises(ValueError, match="sample 0 of prompt 0 has no prompt tokens"):
        build_packed_batch([make_sample(3, 0)], [0], pad_multiple=1, pad_token_id=0)


def test_a_step_is_divided_by_whole_groups_of_any_sizes() -> None:
    config = Config(train=TrainSection(num_minibatches=2), batch=BatchSection(max_tokens_per_microbatch=64))
    sizes = [1, 3, 2, 4]
    division = divide([5] * sum(sizes), sizes, config, num_ranks=2)
    found = [sorted(i for share in shares for indices, _ in share for i in indices) for shares in division.minibatches]
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9]]
    assert len(division.wanted) == 2
    assert sorted(i for wanted in division.wanted for i in wanted) == list(range(10))
