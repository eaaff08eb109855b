"""The checksums that vLLM's workers compute, and the way of weights to them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.digest import _CHUNK_ELEMENTS, digest, label
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.transport import pack, unpack


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_a_digest_is_the_sum_of_those_of_its_pieces(dtype: torch.dtype) -> None:
    tensor = (random_tensor(7, 11) * 50).to(dtype)
    pieces = digest(tensor[:3]) + digest(tensor[3:4], start=33) + digest(tensor[4:], start=44)
    assert pieces % 2**64 == digest(tensor) != 0
    assert digest(tensor[:3]) + digest(tensor[3:4]) + digest(tensor[4:]) != digest(tensor), "positions count"


def test_a_digest_of_one_number_by_hand() -> None:
    # splitmix64's first steps on position 1 (positions count from 1), made odd; times the bits of 2.0 as int32.
    mask = 2**64 - 1

    def shift(x: int, by: int) -> int:  # arithmetic, as on int64
        return ((x - 2**64 if x >> 63 else x) >> by) & mask

    mixed = 0x9E3779B97F4A7C15
    mixed ^= shift(mixed, 30)
    mixed = mixed * 0xBF58476D1CE4E5B9 & mask
    mixed ^= shift(mixed, 27)
    assert digest(torch.tensor([2.0])) == 0x40000000 * (mixed | 1) & mask


def test_a_digest_goes_on_beyond_its_chunks() -> None:
    tensor = torch.zeros(_CHUNK_ELEMENTS + 3, dtype=torch.int8)
    tensor[-1] = 1
    assert digest(tensor) == digest(tensor[-1:], start=_CHUNK_ELEMENTS + 2)


def test_every_single_bit_and_exchange_changes_a_digest() -> None:
    tensor = random_tensor(5, 6, dtype=torch.bfloat16)
    found = {digest(tensor)}
    for position in range(tensor.numel()):
        for bit in range(16):
            changed = tensor.clone()
            changed.view(torch.int16).view(-1)[position] ^= -(2**15) if bit == 15 else 1 << bit
            found.add(digest(changed))
    assert len(found) == 1 + 30 * 16
    assert digest(tensor.flip(0)) not in found
    assert digest(tensor.t().contiguous()) != digest(tensor)


def test_a_label_tells_dtypes_apart() -> None:
    bits = torch.tensor([1, 2], dtype=torch.int32)
    assert digest(bits) == digest(bits.view(torch.float32))
    assert label(digest(bits), torch.int32) != label(digest(bits), torch.float32) == f"float32:{digest(bits):016x}"


def test_a_packed_buffer_arrives_in_memory_of_its_own() -> None:
    flat = torch.arange(256, dtype=torch.uint8)
    arrived = unpack(pack(flat), torch.device("cpu"))
    assert torch.equal(arrived, flat)
    flat.zero_()
    assert arrived.sum() == 255 * 128
