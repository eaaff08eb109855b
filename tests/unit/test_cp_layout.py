"""Index arithmetic of the zigzag layout."""

from __future__ import annotations

import pytest
import torch

from megatron_fipo.parallel import cp_layout

# Two sequences of 8 and 4 rows, two ranks: chunks of 2 and 1 rows. Rank 0 holds chunks 0 and 3, rank 1 chunks 1 and 2.
CU_SEQLENS = torch.tensor([0, 8, 12], dtype=torch.int32)


def test_rows_by_hand() -> None:
    assert cp_layout.local_indices(CU_SEQLENS, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert cp_layout.local_indices(CU_SEQLENS, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert cp_layout.gathered_positions(CU_SEQLENS, 2).tolist() == [0, 1, 6, 7, 8, 11, 2, 3, 4, 5, 9, 10]


def test_segments_by_hand() -> None:
    assert cp_layout.segment_starts(CU_SEQLENS, 2, 0).tolist() == [0, 6, 8, 11]
    assert cp_layout.segment_starts(CU_SEQLENS, 2, 1).tolist() == [2, 4, 9, 10]
    assert cp_layout.local_cu_segments(CU_SEQLENS, 2).tolist() == [0, 2, 4, 5, 6]
    assert cp_layout.local_sequence_ids(CU_SEQLENS, 2).tolist() == [0, 0, 0, 0, 1, 1]


def test_without_context_parallelism_nothing_moves() -> None:
    cu_seqlens = torch.tensor([0, 3, 3, 8])
    assert cp_layout.num_chunks_of(1) == 1
    assert cp_layout.local_indices(cu_seqlens, 1, 0).tolist() == list(range(8))
    assert cp_layout.local_cu_segments(cu_seqlens, 1).tolist() == [0, 3, 3, 8]
    assert cp_layout.local_sequence_ids(cu_seqlens, 1).tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
    cp_layout.check_padded(cu_seqlens, 1)


@pytest.mark.parametrize("cp_size", [1, 2, 3, 4, 8])
def test_ranks_share_every_row_once_and_evenly(cp_size: int) -> None:
    unit = cp_layout.num_chunks_of(cp_size)
    lengths = torch.tensor([3, 0, 1, 5, 1]) * unit
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    shares = [cp_layout.local_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)]
    assert {len(share) for share in shares} == {int(cu_seqlens[-1]) // cp_size}
    assert torch.cat(shares).sort().values.tolist() == list(range(int(cu_seqlens[-1])))
    assert torch.equal(torch.cat(shares), cp_layout.gathered_positions(cu_seqlens, cp_size))


def test_a_length_that_does_not_divide_is_refused_with_its_remedy() -> None:
    with pytest.raises(ValueError, match="sequence 1 has 1030") as caught:
        cp_layout.check_padded(torch.tensor([0, 8, 1038]), 4)
    assert str(caught.value) == (
        "parallel.cp=4 needs padded lengths divisible by 8; sequence 1 has 1030. Set batch.pad_multiple to a multiple "
        "of 8."
    )
