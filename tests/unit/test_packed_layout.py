"""Where packed sequences lie, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_fipo.parallel import cp_layout
from megatron_fipo.rl.packed_layout import PackedLayout, round_up

LAYOUT = PackedLayout(lengths=(3, 5), padded=(4, 8))


@pytest.mark.parametrize(("number", "expected"), [(0, 0), (1, 4), (4, 4), (5, 8), (2**60 + 1, 2**60 + 4)])
def test_round_up(number: int, expected: int) -> None:
    assert round_up(number, 4) == expected


def test_lengths_without_and_with_padding() -> None:
    assert LAYOUT.cu_seqlens.tolist() == [0, 3, 8]
    assert LAYOUT.cu_seqlens_padded.tolist() == [0, 4, 12]
    assert LAYOUT.cu_seqlens.dtype == LAYOUT.cu_seqlens_padded.dtype == torch.int64
    assert (LAYOUT.num_tokens, LAYOUT.num_sequences) == (12, 2)


def test_a_process_that_holds_all_has_whole_sequences() -> None:
    assert [LAYOUT.rows_of(sequence) for sequence in (0, 1)] == [slice(0, 4), slice(4, 12)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_share_of_each_sequence(rank: int) -> None:
    sharded = replace(LAYOUT, cp_size=2, cp_rank=rank)
    assert [sharded.rows_of(sequence) for sequence in (0, 1)] == [slice(0, 2), slice(2, 6)]
    ids = cp_layout.local_sequence_ids(sharded.cu_seqlens_padded, 2)
    assert [ids[sharded.rows_of(sequence)].tolist() for sequence in (0, 1)] == [[0, 0], [1, 1, 1, 1]]
    assert sharded.num_tokens == 12, "of the whole sequences"


def test_tables_are_made_once() -> None:
    layout = replace(LAYOUT)
    assert layout.cu_seqlens_padded is layout.cu_seqlens_padded
    assert replace(LAYOUT, cp_size=2).cu_seqlens_padded is not layout.cu_seqlens_padded
