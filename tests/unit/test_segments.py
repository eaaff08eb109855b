"""Tables of segments by hand, and tables of powers, which are kept."""

from __future__ import annotations

import pytest
import torch

from megatron_fipo.rl import future_kl as future_kl_module
from megatron_fipo.rl.future_kl import decay_to_end, future_kl, power_table, segment_heads
from megatron_fipo.rl.segments import BLOCK, segments_of

CPU = torch.device("cpu")


def test_tables_by_hand() -> None:
    """A token, nothing, and a block and two tokens: blocks 0; 1 and 2."""
    segments = segments_of(torch.tensor([0, 1, 1, BLOCK + 3]), BLOCK + 3, CPU)
    assert (segments.num_tokens, segments.longest) == (BLOCK + 3, BLOCK + 2)
    assert segments.per_token(torch.tensor([5, 6, 7])).tolist() == [5] + [7] * (BLOCK + 2)
    assert segments.levels is not None
    first, second = segments.levels
    assert first.num_blocks == 3
    assert first.places is not None
    assert first.places.tolist() == [0, *range(BLOCK, 2 * BLOCK + 2)]
    assert first.last_blocks is not None
    assert first.last_blocks.tolist() == [0, 2]
    # The heads of three blocks: those of segments 0 and 2 begin a block each.
    assert second.num_blocks == 2
    assert second.places is not None
    assert second.places.tolist() == [0, BLOCK, BLOCK + 1]
    assert second.last_blocks is None


def test_whole_blocks_stay_where_they_are() -> None:
    (level,) = segments_of(torch.tensor([0, BLOCK, 2 * BLOCK]), 2 * BLOCK, CPU).levels or ()
    assert level.places is None


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]])
def test_without_tokens_there_is_no_table(cu: list[int]) -> None:
    segments = segments_of(torch.tensor(cu), 0, CPU)
    assert segments.levels == ()
    assert segments.longest == 0
    assert future_kl(torch.zeros(0), segments, 32.0).shape == (0,)
    assert segment_heads(torch.zeros(0), segments).tolist() == [0.0] * (len(cu) - 1)
    assert decay_to_end(segments, 32.0).shape == (0,)


def test_segments_made_before_give_the_same_bits_as_plain_lengths() -> None:
    x, cu = torch.randn(3000, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 33, 2000, 2000, 3000])
    segments = segments_of(cu, 3000, CPU)
    for function in (future_kl, lambda values, where, _: segment_heads(values, where)):
        assert torch.equal(function(x, segments, 32.0), function(x, cu, 32.0))
    assert torch.equal(decay_to_end(segments, 32.0), decay_to_end(cu, 32.0))


def test_segments_of_another_layout_are_refused() -> None:
    segments = segments_of(torch.tensor([0, 4]), 4, CPU)
    with pytest.raises(ValueError, match="made for 4 tokens but there are 5"):
        future_kl(torch.zeros(5), segments, 32.0)


def test_a_table_of_powers_is_made_once_and_is_what_it_would_be_alone() -> None:
    future_kl_module._power_table.cache_clear()
    for count in (1000, 1024, 700, 513):
        alone = torch.exp2(-(1 / 32.0) * torch.arange(count, dtype=torch.float64))
        # A CPU's last few numbers go another way than the rest, to the last bit; in a longer table others are the last.
        torch.testing.assert_close(power_table(1 / 32.0, count, CPU), alone, rtol=2.0**-51, atol=0.0)
        assert torch.equal(power_table(1 / 32.0, count, CPU, torch.float32), alone.float())
    made = future_kl_module._power_table.cache_info()
    assert made.misses == 2  # one for each dtype
    power_table(1 / 32.0, 1025, CPU)
    power_table(1 / 8.0, 1024, CPU)
    assert future_kl_module._power_table.cache_info().misses == 4
    for half_life in range(1, 600):
        power_table(1 / half_life, 10, CPU)
    assert future_kl_module._power_table.cache_info().currsize == made.maxsize == 256


def test_a_table_first_made_in_inference_mode_takes_part_in_gradients() -> None:
    half_life, x = 37.25, torch.ones(100, requires_grad=True)
    with torch.inference_mode():
        future_kl(torch.ones(100), torch.tensor([0, 100]), half_life)
    future_kl(x, torch.tensor([0, 100]), half_life).sum().backward()
    assert x.grad is not None
    assert x.grad[0] == 1.0
