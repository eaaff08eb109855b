"""What vLLM's workers are expected to hold, against parameters put together as vLLM does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape, read_model_shape
from megatron_fipo.rollout.server_plugins.megatron_fipo_vllm.digest import _CHUNK_ELEMENTS, digest, label
from megatron_fipo.rollout.server_plugins.megatron_fipo_vllm.transport import pack, unpack
from megatron_fipo.rollout.vllm_checksums import VllmLedger
from tests.models import load, save_random_model


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


def ledger_of(weights: dict[str, Tensor], shape: ModelShape, tp: int) -> VllmLedger:
    ledger = VllmLedger(shape, tp)
    for name, tensor in weights.items():
        ledger.add(name, tensor)
    return ledger


def held_by(weights: dict[str, Tensor], shape: ModelShape, tp: int, rank: int) -> dict[str, Tensor]:
    """A rank's parameters, by concatenation and padding."""
    held = {}

    def rows(name: str, parts: int, part: int) -> Tensor:
        return weights[name].chunk(parts)[part]

    groups = shape.num_query_groups
    for layer in range(shape.num_layers):
        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        for kind in ("weight", "bias"):
            if f"{attention}q_proj.{kind}" in weights:
                parts, part = (tp, rank) if groups >= tp else (groups, rank * groups // tp)
                held[f"{attention}qkv_proj.{kind}"] = torch.cat(
                    [rows(f"{attention}q_proj.{kind}", tp, rank)]
                    + [rows(f"{attention}{name}_proj.{kind}", parts, part) for name in "kv"]
                )
        gate_up = [rows(f"{mlp}{name}_proj.weight", tp, rank) for name in ("gate", "up")]
        held[f"{mlp}gate_up_proj.weight"] = torch.cat(gate_up)
        for name in (f"{attention}o_proj.weight", f"{mlp}down_proj.weight"):
            held[name] = weights[name].chunk(tp, dim=1)[rank]
    for name, tensor in weights.items():
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            padded = torch.zeros(-(-len(tensor) // 64) * 64, tensor.shape[1], dtype=tensor.dtype)
            padded[: len(tensor)] = tensor
            held[name] = padded.chunk(tp)[rank]
        elif "norm" in name:
            held[name] = tensor
    return held


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("qwen3", True)])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_the_ledger_knows_what_each_rank_holds(tmp_path: Path, family: str, tied: bool, tp: int) -> None:
    folder = save_random_model(tmp_path, family, vocab_size=100, num_hidden_layers=2, tie_word_embeddings=tied)
    shape = read_model_shape(folder)
    weights = {name: tensor.bfloat16() for name, tensor in load(folder).state_dict().items()}
    expected = ledger_of(weights, shape, tp).expected()
    if tied:
        weights.pop("lm_head.weight")
    held = {
        f"{name} (rank {rank})": label(digest(tensor), tensor.dtype)
        for rank in range(tp)
        for name, tensor in held_by(weights, shape, tp, rank).items()
    }
    assert expected == held
    weights["model.layers.1.self_attn.v_proj.weight"][-1, -1] += 1  # in the last rank alone
    changed = ledger_of(weights, shape, tp).expected()
    assert [name for name in held if changed[name] != held[name]] == [
        f"model.layers.1.self_attn.qkv_proj.weight (rank {rank})"
        for rank in ({1: [0], 2: [1], 4: [2, 3]}[tp])  # two key-value heads: two ranks hold each at tp 4
    ]


def test_the_ledger_refuses_parts_without_the_others(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path)
    weights = load(folder).state_dict()
    del weights["model.layers.2.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"lack k_proj of model\.layers\.2\.self_attn\.qkv_proj\.weight \(1 such"):
        ledger_of(weights, read_model_shape(folder), 1).expected()


def test_the_ledger_refuses_parts_of_different_dtypes(tmp_path: Path) -> None:
    ledger = VllmLedger(read_model_shape(save_random_model(tmp_path)), 1)
    ledger.add("model.layers.0.mlp.gate_proj.weight", torch.ones(64, 32))
    with pytest.raises(ValueError, match=r"up_proj\.weight is torch\.bfloat16, what .*gate_up_proj\.weight also"):
        ledger.add("model.layers.0.mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.bfloat16))
