"""The blocked suffix sum against the recurrence, over the lengths and values that break scans."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_fipo.rl.future_kl import (
    BLOCK,
    decay_to_end,
    future_kl,
    future_kl_reference,
    segment_heads,
    segment_suffix_sum,
)

SuffixSum = Callable[[Tensor, Tensor, float], Tensor]

BOUND = 2e-6
SMALLEST_FLOAT32 = 2.0**-149
HALF_LIVES = (1.0, 8.0, 32.0, 128.0, 256.0)
LONG = 20480
SPECIAL_LENGTHS = (0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 5, BLOCK * BLOCK + 1)


def cumulative(lengths: list[int] | tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)])


def within_bound(actual: Tensor, x: Tensor, cu_seqlens: Tensor, half_life: float) -> bool:
    """The promised bound; where a sum is itself subnormal, up to float32's smallest step."""
    error = (actual.double() - future_kl_reference(x, cu_seqlens, half_life)).abs()
    allowed = BOUND * future_kl_reference(x.abs(), cu_seqlens, half_life)
    return bool((error <= allowed + SMALLEST_FLOAT32).all())


def long_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    signs = torch.tensor([1.0, -1.0]).repeat(LONG // 2)
    impulses = torch.zeros(LONG)
    impulses[[0, BLOCK - 1, BLOCK, 9999, LONG - 1]] = torch.tensor([20.0, -20.0, 1e-3, 7.0, -3.0])
    return {
        "alternating": 20 * signs,
        "nearly cancelling": 20 * signs + 1e-6 * torch.randn(LONG, generator=generator),
        "positive": torch.rand(LONG, generator=generator) * 20,
        "constant third": torch.full((LONG,), 1 / 3),
        "impulses": impulses,
        "smallest normal": torch.randn(LONG, generator=generator) * 1e-37,
        "subnormal": torch.randn(LONG, generator=generator) * 1e-42,
        "noise": torch.randn(LONG, generator=generator) * 1e-3,
    }


def test_hand_computed() -> None:
    # gamma = 1/2; two sequences, [1, 2, 4] and [8, -8].
    result = future_kl(torch.tensor([1.0, 2.0, 4.0, 8.0, -8.0]), torch.tensor([0, 3, 5]), 1.0)
    assert result.tolist() == [3.0, 4.0, 4.0, 4.0, -8.0]
    assert result.dtype == torch.float32


@pytest.mark.parametrize("half_life", HALF_LIVES)
@pytest.mark.parametrize("name", long_inputs())
def test_bound_over_a_long_sequence(name: str, half_life: float) -> None:
    x, cu = long_inputs()[name], torch.tensor([0, LONG])
    assert within_bound(future_kl(x, cu, half_life), x, cu, half_life)


@pytest.mark.parametrize("half_life", [1.0, 32.0, 256.0])
def test_bound_over_every_pair_of_special_lengths(half_life: float) -> None:
    for lengths in itertools.product(SPECIAL_LENGTHS, repeat=2):
        cu = cumulative((*lengths, 3))
        x = torch.randn(int(cu[-1]), generator=torch.Generator().manual_seed(sum(lengths)))
        assert within_bound(future_kl(x, cu, half_life), x, cu, half_life), lengths


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_bound_over_drawn_sequences(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=6))
    values = st.floats(-(2.0**20), 2.0**20, width=32)
    x = torch.tensor(data.draw(st.lists(values, min_size=sum(lengths), max_size=sum(lengths))), dtype=torch.float32)
    half_life = data.draw(st.floats(0.25, 512.0))
    assert within_bound(future_kl(x, cumulative(lengths), half_life), x, cumulative(lengths), half_life)


def test_many_short_sequences() -> None:
    lengths = torch.randint(60, 101, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    cu = cumulative(lengths)
    x = torch.randn(int(cu[-1]), generator=torch.Generator().manual_seed(2))
    assert within_bound(future_kl(x, cu, 32.0), x, cu, 32.0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integer_types_of_cu_seqlens(dtype: torch.dtype) -> None:
    x = torch.randn(100)
    expected = future_kl(x, torch.tensor([0, 37, 100]), 32.0)
    assert torch.equal(future_kl(x, torch.tensor([0, 37, 100], dtype=dtype), 32.0), expected)


def test_a_sequence_never_reaches_another() -> None:
    cu = torch.tensor([0, 50, 120, 200])
    x = torch.randn(200)
    spoilt = x.clone()
    spoilt[70] = torch.nan
    clean, result = future_kl(x, cu, 32.0), future_kl(spoilt, cu, 32.0)
    assert result[50:71].isnan().all()
    assert torch.equal(result[:50], clean[:50])
    assert torch.equal(result[120:], clean[120:])


def test_nothing_to_sum() -> None:
    assert future_kl(torch.zeros(0), torch.tensor([0]), 32.0).shape == (0,)
    assert future_kl(torch.zeros(0), torch.tensor([0, 0, 0]), 32.0).shape == (0,)


def test_gradient_is_the_discounted_prefix_sum() -> None:
    x = torch.randn(70, requires_grad=True)
    cu = torch.tensor([0, 3, 70])
    future_kl(x, cu, 1.0).sum().backward()
    assert x.grad is not None
    # Token k enters F_t for every t <= k with 2^-(k - t): 1, 1.5, 1.75, then from 1 again.
    assert x.grad[:4].tolist() == [1.0, 1.5, 1.75, 1.0]
    assert float(x.grad[69]) == 2.0


def test_chunks_with_a_carry_equal_the_whole() -> None:
    """What context parallelism does: scan chunks, fold the heads backwards, add the carry."""
    half_life, lengths = 32.0, (200, 0, 333)
    cu = torch.tensor([0, 533])
    x = torch.randn(533, generator=torch.Generator().manual_seed(3))
    cu_chunks = cumulative(lengths)
    local = segment_suffix_sum(x, cu_chunks, half_life)
    heads = segment_heads(local, cu_chunks)
    assert heads.tolist() == [float(local[0]), 0.0, float(local[200])]
    gamma = 2 ** (-1 / half_life)
    carry = torch.zeros(3)
    for chunk in (1, 0):
        carry[chunk] = heads[chunk + 1] + gamma ** lengths[chunk + 1] * carry[chunk + 1]
    whole = local + decay_to_end(cu_chunks, half_life) * carry.repeat_interleave(torch.tensor(lengths))
    assert within_bound(whole, x, cu, half_life)
    assert not within_bound(local, x, cu, half_life)


def test_decay_to_end_by_hand() -> None:
    assert decay_to_end(torch.tensor([0, 2, 2, 5]), 1.0).tolist() == [0.25, 0.5, 0.125, 0.25, 0.5]
    assert decay_to_end(torch.tensor([0]), 1.0).shape == (0,)


def cumulative_sum_over_powers(x: Tensor, cu: Tensor, half_life: float) -> Tensor:
    powers = 2 ** (-torch.arange(len(x)) / half_life)
    return (x * powers).flip(0).cumsum(0).flip(0) / powers


def bfloat16_powers(x: Tensor, cu: Tensor, half_life: float) -> Tensor:
    gamma = float(torch.tensor(2 ** (-1 / half_life)).bfloat16())
    return future_kl_reference(x, cu, -1 / float(torch.tensor(gamma).double().log2()))


def float32_gamma(x: Tensor, cu: Tensor, half_life: float) -> Tensor:
    """gamma rounded to float32 before it is raised to powers."""
    gamma = float(torch.tensor(2 ** (-1 / half_life), dtype=torch.float32))
    return future_kl_reference(x, cu, -1 / float(torch.tensor(gamma).double().log2()))


@pytest.mark.parametrize(
    ("wrong", "half_life"),
    [(cumulative_sum_over_powers, 32.0), (bfloat16_powers, 32.0), (bfloat16_powers, 256.0), (float32_gamma, 256.0)],
)
def test_the_bound_notices_less_exact_sums(wrong: SuffixSum, half_life: float) -> None:
    x, cu = long_inputs()["positive"], torch.tensor([0, LONG])
    assert not within_bound(wrong(x, cu, half_life), x, cu, half_life)


def test_the_bound_notices_lost_carries() -> None:
    x, cu = long_inputs()["positive"], torch.tensor([0, LONG])
    blocks_by_themselves = future_kl(x, torch.arange(0, LONG + 1, BLOCK), 32.0)
    assert not within_bound(blocks_by_themselves, x, cu, 32.0)


@pytest.mark.parametrize(
    ("x", "cu_seqlens", "half_life", "message"),
    [
        (torch.zeros(4, dtype=torch.bfloat16), [0, 4], 32.0, "float32 vector.*bfloat16"),
        (torch.zeros(4, dtype=torch.float64), [0, 4], 32.0, "float32 vector.*float64"),
        (torch.zeros(2, 2), [0, 4], 32.0, r"float32 vector.*\(2, 2\)"),
        (torch.zeros(4), [0, 4], 0.0, "half_life_tokens=0.0 must be a positive"),
        (torch.zeros(4), [0, 4], -1.0, "half_life_tokens=-1.0"),
        (torch.zeros(4), [0, 4], float("nan"), "half_life_tokens=nan"),
        (torch.zeros(4), [0, 3], 32.0, "runs from 0 to 3 .* number of tokens, 4"),
        (torch.zeros(4), [1, 4], 32.0, "runs from 1 to 4"),
        (torch.zeros(4), [0, 3, 2, 4], 32.0, "must not descend; entry 2 is 2 after 3"),
        (torch.zeros(4), [], 32.0, "must be a vector of integers"),
        (torch.zeros(4), [0.0, 4.0], 32.0, "must be a vector of integers.*float32"),
    ],
)
def test_refuses(x: Tensor, cu_seqlens: list[float], half_life: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        future_kl(x, torch.tensor(cu_seqlens), half_life)
