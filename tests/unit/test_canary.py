"""Comparisons that decide whether a run may go on, and the checksums that they rest on."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.rollout.servers.proof import CanaryError, canary_sequences, compare_checksums, compare_log_probs
from megatron_fipo.rollout.servers.sglang.checksums import SglangExpectedChecksums, gpu_hash, sha_hash
from megatron_fipo.rollout.servers.vllm.checksums import VllmExpectedChecksums
from tests.models import load, save_random_model


def test_equal_checksums_pass() -> None:
    compare_checksums("s", {"a": "1", "b": "2"}, {"b": "2", "a": "1"})


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"a": "1", "b": "3"}, "1 tensors differ: b"),
        ({"a": "2", "b": "1"}, "2 tensors differ: a, b"),
        ({"a": "1"}, "1 tensors are missing: b"),
        ({"a": "1", "b": "2", "c": "3"}, "1 tensors were not sent to it: c"),
        ({}, "2 tensors are missing"),
    ],
)
def test_any_difference_is_refused(found: dict[str, str], message: str) -> None:
    with pytest.raises(CanaryError, match=f"^server 3 does not hold .*{message}"):
        compare_checksums("server 3", {"a": "1", "b": "2"}, found)


def test_log_probs_within_the_tolerance_pass() -> None:
    difference = compare_log_probs("s", [[-1.0, -2.0], [-3.0]], [[-1.0, -2.3], [-3.0]], tolerance=0.11)
    assert difference.mean == pytest.approx(0.1)
    assert difference.max == pytest.approx(0.3)


@pytest.mark.parametrize("wrong", [-2.4, math.nan, -math.inf])
def test_log_probs_beyond_it_are_refused(wrong: float) -> None:
    with pytest.raises(CanaryError, match=r"over 3 tokens.*servers\.canary_tolerance allows 0\.11"):
        compare_log_probs("s", [[-1.0, -2.0], [-3.0]], [[-1.0, wrong], [-3.0]], tolerance=0.11)


def test_log_probs_of_other_lengths_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="shorter"):
        compare_log_probs("s", [[-1.0, -2.0]], [[-1.0]], tolerance=1.0)


def test_canary_sequences_are_the_same_everywhere() -> None:
    first = canary_sequences(50, 3, num_tokens=8)
    assert first == canary_sequences(50, 3, num_tokens=8)
    assert [len(sequence) for sequence in first] == [8, 8, 8]
    assert all(0 <= token < 50 for sequence in first for token in sequence)


# --- SGLang's checksums -----------------------------------------------------------------------------------------------


def test_the_hash_is_the_beginning_of_sha_256() -> None:
    tensor = torch.arange(6, dtype=torch.bfloat16).reshape(2, 3)
    raw = tensor.view(torch.int16).numpy().tobytes()
    assert sha_hash(tensor) == hashlib.sha256(raw).hexdigest()[:16]
    assert sha_hash(tensor.t()) != sha_hash(tensor)  # by values in their order, not by memory


def plain_gpu_hash(raw: bytes) -> str:
    """The same in plain integers, word by word."""
    mask = 2**32 - 1

    def mix(x: int) -> int:
        x ^= x >> 16
        x = x * 0x85EBCA6B & mask
        x ^= x >> 13
        x = x * 0xC2B2AE35 & mask
        return x ^ (x >> 16)

    raw += b"\0" * (-len(raw) % 4)
    words = [int.from_bytes(raw[i : i + 4], "little") for i in range(0, len(raw), 4)]
    seed = 0x243F6A88
    total = 0
    for start in range(0, len(words), 8192):
        for shift, (key, factor, turn) in (
            (32, (seed, 0x27D4EB2D, 15)),
            (0, (((seed * 0x9E3779B1) ^ 0xDEADBEEF) & mask, 0x165667B1, 13)),
        ):
            tile = 0
            for i, word in enumerate(words[start : start + 8192], start):
                position = ((i * factor + key) & mask) ^ (((i << turn) | (i >> (32 - turn))) & mask)
                tile = (tile + mix(word ^ position)) & mask
            total += mix(tile ^ len(raw)) << shift
    total &= 2**64 - 1
    total = ((total ^ (total >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    total = ((total ^ (total >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return f"{total ^ (total >> 31):016x}"


@pytest.mark.parametrize("num_bytes", [1, 3, 4, 5, 8192 * 4 - 2, 8192 * 4, 8192 * 4 + 2, 3 * 8192 * 4 + 7])
def test_gpu_hash_equals_plain_integers(num_bytes: int) -> None:
    raw = torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))
    assert gpu_hash(raw) == plain_gpu_hash(bytes(raw.tolist()))


class Reads(TorchDispatchMode):
    """Counts where a number is read from a tensor: on a GPU each waits for all that was asked for before."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_a_ledger_reads_nothing_before_its_end(engine: str, tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "model")
    shape = read_model_shape(folder)
    ledger = (
        SglangExpectedChecksums(shape, 2, hashes_on_gpu=True) if engine == "sglang" else VllmExpectedChecksums(shape, 2)
    )
    with Reads() as reads:
        for name, tensor in load(folder).state_dict().items():
            ledger.add(name, tensor.detach())
        assert reads.count == 0
        checksums = ledger.expected()
    assert len(set(checksums.values())) > 20
    with Reads() as reads:
        gpu_hash(torch.ones(3))
    assert reads.count == 1, "what counts notices a read"


def test_gpu_hash_sees_one_bit_and_an_exchange() -> None:
    tensor = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    changed, swapped = tensor.clone(), tensor.clone()
    changed.view(torch.int32)[1234] ^= 1
    swapped[[5, 6]] = tensor[[6, 5]]
    assert len({gpu_hash(each) for each in (tensor, changed, swapped)}) == 3
    assert gpu_hash(torch.empty(0)) == "0" * 16
