"""What each rank of a server is expected to hold, against parameters put together as SGLang and vLLM do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape, read_model_shape
from megatron_fipo.rollout.servers.api import ExpectedChecksums
from megatron_fipo.rollout.servers.fused_layout import FusedLayout
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.digest import digest, label
from megatron_fipo.rollout.servers.sglang.checksums import SglangExpectedChecksums, gpu_hash, sha_hash
from megatron_fipo.rollout.servers.vllm.checksums import VllmExpectedChecksums
from tests.models import load, save_random_model

Hash = Callable[[Tensor], str]
ENGINES: dict[str, tuple[Callable[[ModelShape, int], ExpectedChecksums], Hash]] = {
    "sglang-cpu": (lambda shape, tp: SglangExpectedChecksums(shape, tp, hashes_on_gpu=False), sha_hash),
    "sglang-gpu": (lambda shape, tp: SglangExpectedChecksums(shape, tp, hashes_on_gpu=True), gpu_hash),
    "vllm": (VllmExpectedChecksums, lambda tensor: label(digest(tensor), tensor.dtype)),
}
"""Each engine's ledger, and its checksum of a whole parameter."""


def key(engine: str, name: str, rank: int, tp: int) -> str:
    return name if engine.startswith("sglang") and tp == 1 else f"{name} (rank {rank})"


def checksums(engine: str, weights: dict[str, Tensor], shape: ModelShape, tp: int) -> dict[str, str]:
    ledger = ENGINES[engine][0](shape, tp)
    for name, tensor in weights.items():
        ledger.add(name, tensor)
        tensor.view(torch.uint8).bitwise_not_()  # as a stream does that fills its memory anew
    for tensor in weights.values():
        tensor.view(torch.uint8).bitwise_not_()
    return ledger.expected()


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
        elif "norm" in name or name.endswith("o_proj.bias"):
            held[name] = tensor
    return held


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("family", "changes"),
    [("qwen2", {}), ("qwen3", {"tie_word_embeddings": True}), ("llama", {"attention_bias": True})],
)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ledgers_know_what_each_rank_holds(
    tmp_path: Path, engine: str, family: str, changes: dict[str, bool], tp: int
) -> None:
    folder = save_random_model(tmp_path, family, vocab_size=100, num_hidden_layers=2, **changes)
    shape = read_model_shape(folder)
    weights = {name: tensor.bfloat16() for name, tensor in load(folder).state_dict().items()}
    found = checksums(engine, weights, shape, tp)
    if shape.tied_embeddings:
        weights.pop("lm_head.weight")
    checksum = ENGINES[engine][1]
    held = {
        key(engine, name, rank, tp): checksum(tensor)
        for rank in range(tp)
        for name, tensor in held_by(weights, shape, tp, rank).items()
    }
    assert found == held
    weights["model.layers.1.self_attn.v_proj.weight"][-1, -1] += 1  # in the last rank alone
    changed = checksums(engine, weights, shape, tp)
    assert [name for name in held if changed[name] != held[name]] == [
        key(engine, "model.layers.1.self_attn.qkv_proj.weight", rank, tp)
        for rank in ({1: [0], 2: [1], 4: [2, 3]}[tp])  # two key-value heads: two ranks hold each at tp 4
    ]


def layout(folder: Path, tp: int = 1) -> FusedLayout:
    return FusedLayout(read_model_shape(save_random_model(folder)), tp)


@pytest.mark.parametrize(("tp", "rows"), [(1, [100]), (2, [64, 36]), (3, [64, 36, 0]), (4, [32, 32, 32, 4])])
def test_the_vocabulary_is_padded_until_ranks_hold_as_many_rows(tmp_path: Path, tp: int, rows: list[int]) -> None:
    """To 128 rows, which three ranks cannot share: for them to 192."""
    table = torch.arange(200.0).view(100, 2)
    name, pieces = layout(tmp_path, tp).place("model.embed_tokens.weight", table)
    assert name == "model.embed_tokens.weight"
    assert torch.equal(torch.cat([piece.rows for piece in pieces]), table)
    assert [len(piece.rows) for piece in pieces] == rows
    assert len({len(piece.rows) + piece.num_padding_rows for piece in pieces}) == 1
    assert sum(len(piece.rows) + piece.num_padding_rows for piece in pieces) == (192 if tp == 3 else 128)


@pytest.mark.parametrize("engine", ENGINES)
def test_parts_without_the_others_are_refused(tmp_path: Path, engine: str) -> None:
    folder = save_random_model(tmp_path)
    weights = load(folder).state_dict()
    del weights["model.layers.2.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"lack k_proj of model\.layers\.2\.self_attn\.qkv_proj\.weight \(1 such"):
        checksums(engine, weights, read_model_shape(folder), 1)


def test_a_parameter_is_whole_with_its_last_part(tmp_path: Path) -> None:
    place = layout(tmp_path)
    gate = torch.ones(64, 32)
    parameter, (piece,) = place.place("model.layers.0.mlp.up_proj.weight", gate)
    assert (parameter, piece.first_row) == ("model.layers.0.mlp.gate_up_proj.weight", 64)
    assert not place.is_whole(parameter)
    place.place("model.layers.0.mlp.gate_proj.weight", gate)
    assert place.is_whole(parameter)
    place.check_whole()


def test_parts_of_different_dtypes_are_refused(tmp_path: Path) -> None:
    place = layout(tmp_path)
    place.place("model.layers.0.mlp.gate_proj.weight", torch.ones(64, 32))
    with pytest.raises(
        ValueError, match=r"up_proj\.weight is bfloat16, but the other parts of .*gate_up_proj\.weight are float32"
    ):
        place.place("model.layers.0.mlp.up_proj.weight", torch.ones(64, 32, dtype=torch.bfloat16))
