"""Attention in half precision on a GPU without Transformer Engine: flash kernels against float64, at real lengths."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from megatron_fipo.actor.model import packed_sequence_params
from megatron_fipo.parallel import cp_attention, cp_layout, varlen_attention
from megatron_fipo.parallel.cp_attention import ContextParallelAttention
from megatron_fipo.parallel.varlen_attention import attend_varlen, build_varlen_layout, kernel_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

HEADS, KEY_HEADS = 14, 2
LENGTHS = [2560, 32, 1024, 640, 4128]
"""Each divides into the chunks of cp 4; some longer than what goes in one piece, some shorter than a kernel's tile."""
BOUND = 8.0
"""Mean error, over that of the exact result rounded to bfloat16 once. Probabilities and their gradients are rounded,
too, and gradients of keys and values for each query head before they are summed."""


def plain(query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output and gradients in float64, a sequence at a time."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (query, key, value)]
    outputs = []
    for start, end in itertools.pairwise([0, *itertools.accumulate(LENGTHS)]):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in inputs)
        k, v = (tensor.repeat_interleave(HEADS // KEY_HEADS, dim=0) for tensor in (k, v))
        scores = q @ k.transpose(-1, -2) * query.shape[-1] ** -0.5
        future = torch.ones(end - start, end - start, dtype=torch.bool, device=query.device).triu(1)
        outputs.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    output = torch.cat(outputs)
    output.backward(gradient.double())
    return [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def inputs_of(channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def make(heads: int) -> Tensor:
        shape = (sum(LENGTHS), heads, channels)
        return torch.randn(shape, generator=generator, device="cuda").to(torch.bfloat16)

    return make(HEADS), make(KEY_HEADS), make(KEY_HEADS), make(HEADS)


def check(ours: list[Tensor], expected: list[Tensor]) -> None:
    for own, exact in zip(ours, expected, strict=True):
        rounding = float((exact.to(torch.bfloat16).double() - exact).abs().mean())
        error = float((own.double() - exact).abs().mean())
        assert error <= BOUND * rounding, (error, rounding)
        assert float((own.double().roll(1, 0) - exact).abs().mean()) > 100 * rounding, "the bound notices nothing"


def attention(channels: int) -> ContextParallelAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * channels, num_attention_heads=HEADS)
    config.attention_dropout = 0.0
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return ContextParallelAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=group))


def in_one_context(channels: int) -> tuple[list[Tensor], Callable[[], Any]]:
    """(output and gradients by the module, one more run of it)."""
    query, key, value, gradient = inputs_of(channels)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        parameters = packed_sequence_params(cu_seqlens, cu_seqlens.cpu())
        output: Tensor = attention(channels)(*inputs, packed_seq_params=parameters)
        output.backward(gradient.flatten(1)[:, None])
        return output

    output = run().detach().view(len(query), HEADS, channels)
    return [output, *(tensor.grad.clone() for tensor in inputs if tensor.grad is not None)], run


@pytest.mark.parametrize("channels", [64, 128])
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_one_rank_attends_as_float64_does(kernel: str, channels: int) -> None:
    without = mock.patch.object(varlen_attention, "_varlen_attn", None)
    if kernel == "varlen":
        assert kernel_for(True, torch.bfloat16, channels) == "varlen"
        ours, _ = in_one_context(channels)
    else:
        with without:
            ours, _ = in_one_context(channels)
    check(ours, plain(*inputs_of(channels)))


@pytest.mark.parametrize("cp_size", [2, 4])
def test_each_context_parallel_rank_attends_as_float64_does(cp_size: int) -> None:
    """Ranks one after the other, with the keys that they would have gathered; gradients of keys summed over them."""
    query, key, value, gradient = inputs_of(128)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device="cuda")
    order = cp_layout.gathered_positions(cu_seqlens, cp_size)
    gathered = [tensor[order].requires_grad_() for tensor in (key, value)]
    ours = [torch.empty_like(query) for _ in range(2)]
    for rank in range(cp_size):
        rows = cp_layout.local_indices(cu_seqlens, cp_size, rank)
        layout = build_varlen_layout(cu_seqlens, max(LENGTHS), cp_size, rank, torch.device("cuda"))
        own = query[rows].requires_grad_()
        output = attend_varlen(own, gathered[0], gathered[1], layout, 128**-0.5)
        output.backward(gradient[rows])
        assert own.grad is not None
        ours[0][rows], ours[1][rows] = output.detach(), own.grad
    back = torch.argsort(order)
    ours += [tensor.grad[back] for tensor in gathered if tensor.grad is not None]
    check(ours, plain(query, key, value, gradient))


@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_no_masked_kernel_attends(kernel: str) -> None:
    with mock.patch.object(
        varlen_attention, "_varlen_attn", varlen_attention._varlen_attn if kernel == "varlen" else None
    ):
        _, run = in_one_context(128)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            run()
    names = {event.key for event in found.key_averages()}
    assert any("flash_attention" in name for name in names), names
    assert not any("attention_math" in name or "efficient_attention" in name for name in names), names


def test_float32_attends_with_a_mask() -> None:
    """What the test above can tell: the numbers of float32 are those of before."""
    assert kernel_for(True, torch.float32, 128) == "masked"
    query = torch.randn(2 * 1024, HEADS, 64, device="cuda")
    key = torch.randn(2 * 1024, KEY_HEADS, 64, device="cuda")
    layout = cp_attention.build_layout(torch.tensor([0, 1024, 2048], device="cuda"), 1, 0)
    assert cp_attention.attend(query, key, key, layout, 0.125).shape == query.shape
