"""Attention over packed, context-parallel sequences is plain causal attention on each sequence, value and gradient.

All in float64, which the code takes as it comes: a wrong row shows as 1, and rounding as 1e-15.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from megatron_fipo.actor.model import packed_sequence_params
from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import cp_attention, cp_layout, varlen_attention
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.cp_attention import ContextParallelAttention
from tests.parallel.ranks import run_ranks
from tests.parallel.test_cp_suffix_sum import zigzag_rows

BOUND = 1e-12
HEADS, CHANNELS = 4, 8
SHORT_PATH_LIMIT, QUERY_BLOCK = 16, 6
"""What the lengths at which sequences go block by block, and the blocks, are set to so that small tests reach them."""


def packed_lengths(cp_size: int) -> dict[str, list[int]]:
    """Padded lengths of packed batches."""
    unit = 2 * cp_size
    return {
        "uneven": [5 * unit, unit, 2 * unit, 13 * unit, unit, 4 * unit],
        "one": [9 * unit],
        "alike": [3 * unit] * 4,
        "with empty ones": [0, 2 * unit, 0, 7 * unit, 0],
        "very uneven": [unit] * 6 + [40 * unit],
    }


def tensors(lengths: list[int], key_heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(query, key, value, output gradient) of the whole packed batch, the same on every rank."""
    generator = torch.Generator().manual_seed(sum(lengths) + key_heads)
    total = sum(lengths)

    def make(heads: int) -> Tensor:
        return torch.randn(total, heads, CHANNELS, generator=generator, dtype=torch.float64)

    return make(HEADS), make(key_heads), make(key_heads), make(HEADS)


def plain_attention(lengths: list[int], key_heads: int) -> list[Tensor]:
    """Output and gradients of query, key and value, one sequence at a time, over the whole packed batch."""
    query, key, value, gradient = tensors(lengths, key_heads)
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    outputs = []
    for start, end in itertools.pairwise([0, *itertools.accumulate(lengths)]):
        # [1, heads, length, channels]; key-value heads repeated by hand.
        q, k, v = (tensor[start:end].transpose(0, 1)[None] for tensor in inputs)
        k, v = (tensor.repeat_interleave(HEADS // key_heads, dim=1) for tensor in (k, v))
        scores = q @ k.transpose(-1, -2) * CHANNELS**-0.5
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
        outputs.append((scores.masked_fill(future, -torch.inf).softmax(-1) @ v)[0].transpose(0, 1))
    output = torch.cat(outputs)
    output.backward(gradient)
    return [output.detach().flatten(1), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


def attention(group: dist.ProcessGroup) -> ContextParallelAttention:
    config = TransformerConfig(num_layers=1, hidden_size=HEADS * CHANNELS, num_attention_heads=HEADS)
    config.attention_dropout = 0.0
    return ContextParallelAttention(config, 1, None, "self", pg_collection=SimpleNamespace(cp=group))


def packed_error(lengths: list[int], key_heads: int, group: dist.ProcessGroup) -> float:
    """Largest difference from plain attention in this rank's rows, over output and gradients."""
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    rows = zigzag_rows(cu_seqlens, group.size(), group.rank())
    query, key, value, gradient = (tensor[rows] for tensor in tensors(lengths, key_heads))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    parameters = packed_sequence_params(cu_seqlens, cu_seqlens)
    output = attention(group)(*inputs, packed_seq_params=parameters)
    assert output.shape == (len(rows), 1, HEADS * CHANNELS)
    output.backward(gradient.flatten(1)[:, None])
    ours = [output.detach()[:, 0], *(tensor.grad for tensor in inputs if tensor.grad is not None)]
    expected = plain_attention(lengths, key_heads)
    return max(
        float((own - whole[rows]).abs().max()) if len(rows) else 0.0 for own, whole in zip(ours, expected, strict=True)
    )


def plain_error(batch_size: int, length: int, group: dist.ProcessGroup) -> float:
    """The same for a batch in Megatron's plain layout, [L / cp, B, heads, channels]."""
    lengths, key_heads = [length] * batch_size, 2
    rows = zigzag_rows(torch.tensor([0, length]), group.size(), group.rank())

    def local(tensor: Tensor) -> Tensor:
        """[B * L, …] -> [L / cp, B, …]."""
        return tensor.view(batch_size, length, *tensor.shape[1:])[:, rows].transpose(0, 1)

    query, key, value, gradient = (local(tensor).contiguous() for tensor in tensors(lengths, key_heads))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    output = attention(group)(*inputs)
    assert output.shape == (len(rows), batch_size, HEADS * CHANNELS)
    output.backward(gradient.flatten(2))
    ours = [output.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]
    expected = [local(tensor) for tensor in plain_attention(lengths, key_heads)]
    return max(float((own - whole).abs().max()) for own, whole in zip(ours, expected, strict=True))


@contextmanager
def in_blocks() -> Iterator[None]:
    """Everything above SHORT_PATH_LIMIT goes block by block."""
    with mock.patch.multiple(cp_attention, _LONGEST_BATCHED_LENGTH=SHORT_PATH_LIMIT, _QUERY_BLOCK=QUERY_BLOCK):
        yield


def _check_all(cp_size: int) -> int:
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    count = 0
    for name, lengths in packed_lengths(cp_size).items():
        for key_heads in (1, 2, HEADS):
            error = packed_error(lengths, key_heads, group)
            assert error <= BOUND, (name, key_heads, error)
            with in_blocks():
                blocks = cp_attention.build_layout(
                    torch.tensor([0, *itertools.accumulate(lengths)]), cp_size, group.rank()
                ).blocks
                assert bool(blocks) == (max(lengths) > SHORT_PATH_LIMIT)
                error = packed_error(lengths, key_heads, group)
            assert error <= BOUND, (name, key_heads, "in blocks", error)
            count += 2
    for batch_size, length in ((1, 2 * cp_size), (3, 6 * cp_size)):
        assert plain_error(batch_size, length, group) <= BOUND
        with in_blocks():
            assert plain_error(batch_size, length, group) <= BOUND
        count += 2
    return count


# --- by a flash kernel, as in half precision on a GPU ----------------------------------------------------------------


def plain_varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.attention.varlen.varlen_attn as documented, pair by pair, which runs on a CPU and in float64."""
    assert window_size == (-1, 0), "not causal"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q.diff().max()) <= max_q
    assert int(cu_seq_k.diff().max()) <= max_k
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    assert enable_gqa is (query.shape[1] != key.shape[1])
    return _pairwise(query, key, value, cu_seq_q, cu_seq_k, scale)


def _pairwise(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, scale: float | None) -> Tensor:
    outputs = []
    for index in range(len(cu_q) - 1):
        q = query[cu_q[index] : cu_q[index + 1]].transpose(0, 1)
        k, v = (tensor[cu_k[index] : cu_k[index + 1]].transpose(0, 1) for tensor in (key, value))
        k, v = (tensor.repeat_interleave(len(q) // max(len(tensor), 1), dim=0) for tensor in (k, v))
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
        scores = (q @ k.transpose(-1, -2) * (scale or 1.0)).masked_fill(future, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def varlen_attn_of_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    """The signature of torch 2.11, which says nothing of shared heads."""
    assert query.shape[1] == key.shape[1]
    assert window_size == (-1, 0)
    return _pairwise(query, key, value, cu_seq_q, cu_seq_k, scale)


def varlen_attn_of_2_10(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    """The first signature."""
    raise AssertionError("it takes no scale")


def real_kernel_for(is_cuda: bool, dtype: torch.dtype, head_dim: int) -> varlen_attention.Kernel:
    """The real choice, as if this were a GPU and float64 half precision."""
    return varlen_attention.kernel_for(True, torch.bfloat16, head_dim)


@contextmanager
def on_a_gpu(kernel: Callable[..., Tensor] | None) -> Iterator[None]:
    """The path that half precision takes on a GPU, with this as torch's kernel."""
    with (
        mock.patch.object(varlen_attention, "_varlen_attn", kernel),
        mock.patch.object(cp_attention, "kernel_for", real_kernel_for),
    ):
        yield


@pytest.mark.parametrize(
    ("is_cuda", "dtype", "head_dim", "kernel", "expected"),
    [
        (True, torch.bfloat16, 128, plain_varlen_attn, "varlen"),
        (True, torch.float16, 64, varlen_attn_of_2_11, "varlen"),
        (True, torch.bfloat16, 128, varlen_attn_of_2_10, "flash"),
        (True, torch.bfloat16, 128, None, "flash"),
        (True, torch.bfloat16, 100, plain_varlen_attn, "flash"),  # flash kernels want heads of multiples of 8
        (True, torch.bfloat16, 512, plain_varlen_attn, "flash"),
        (True, torch.float32, 128, plain_varlen_attn, "masked"),
        (False, torch.bfloat16, 128, plain_varlen_attn, "masked"),
    ],
)
def test_which_kernel_attends(
    is_cuda: bool, dtype: torch.dtype, head_dim: int, kernel: Callable[..., Tensor] | None, expected: str
) -> None:
    with mock.patch.object(varlen_attention, "_varlen_attn", kernel):
        assert varlen_attention.kernel_for(is_cuda, dtype, head_dim) == expected
        assert varlen_attention.kernel_in_words(is_cuda, dtype, head_dim).startswith("torch's")


def test_the_installed_torch_has_the_kernel() -> None:
    assert varlen_attention.kernel_for(True, torch.bfloat16, 128) == "varlen"


def _check_flash(cp_size: int) -> int:
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    calls = []
    for name, kernel in (("2.13", plain_varlen_attn), ("2.11", varlen_attn_of_2_11), ("none", None)):
        for lengths in packed_lengths(cp_size).values():
            for key_heads in (1, 2, HEADS):
                noting = kernel and mock.create_autospec(kernel, side_effect=kernel)
                with on_a_gpu(noting), in_blocks():
                    error = packed_error(lengths, key_heads, group)
                assert error <= BOUND, (name, lengths, key_heads, error)
                assert noting is None or noting.call_count == 1, "one call for the whole microbatch"
                calls.append(name)
        with on_a_gpu(kernel), in_blocks():
            assert plain_error(3, 6 * cp_size, group) <= BOUND
    return len(calls)


@pytest.mark.filterwarnings("ignore:.*attention.*:UserWarning")
@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_flash_kernels_are_asked_for_plain_attention(cp_size: int) -> None:
    assert run_ranks(_check_flash, cp_size, cp_size, timeout_s=120) == [45] * cp_size


def _check_what_is_noticed_of_flash(cp_size: int) -> None:
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    lengths = packed_lengths(cp_size)["uneven"]
    real = varlen_attention.build_varlen_layout

    def keys_of_another_chunk(cu_seqlens: Tensor, longest: int, size: int, rank: int, device: torch.device) -> Any:
        return real(cu_seqlens, longest, size, (rank + 1) % size, device)

    def keys_as_they_lie(*arguments: Any) -> Any:
        layout = real(*arguments)
        assert layout.key_rows is not None
        return replace(layout, key_rows=torch.arange(len(layout.key_rows)) % sum(lengths))

    for wrong in (keys_of_another_chunk, keys_as_they_lie):
        with on_a_gpu(plain_varlen_attn), mock.patch.object(cp_attention, "build_varlen_layout", wrong):
            own = packed_error(lengths, 2, group)
        found: list[float] = [0.0] * group.size()
        dist.all_gather_object(found, own, group=group)
        assert max(found) > 1e-3, f"{wrong.__name__}: not noticed"


def test_keys_of_the_wrong_rows_are_noticed() -> None:
    run_ranks(_check_what_is_noticed_of_flash, 2, 2, timeout_s=120)


def test_a_length_that_flash_could_not_cut_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.cp=2 needs padded lengths divisible by 4; sequence 1 has 6"):
        varlen_attention.build_varlen_layout(torch.tensor([0, 8, 14]), 8, 2, 0, torch.device("cpu"))


def test_a_block_of_queries_is_described_to_flash_without_a_mask() -> None:
    """What `_attend_block` hands over: no tensor of a mask, which flash does not take, but the bias that says it."""
    seen = []

    def noting(query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float) -> Tensor:
        seen.append(mask)
        return query

    query, key, value, _ = tensors([32], 2)
    for kernel, patched in (("masked", nullcontext()), ("flash", on_a_gpu(None))):
        with patched, mock.patch.object(cp_attention, "_sdpa", noting):
            cp_attention._attend_block(query[:8], key, value, torch.arange(24), 1.0)
        assert isinstance(seen[-1], CausalBias) is (kernel == "flash")
    assert (seen[1].variant, seen[1].seq_len_q, seen[1].seq_len_kv) == (CausalVariant.LOWER_RIGHT, 8, 24)


# --- what holds for all of them --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_values_and_gradients_are_those_of_plain_attention(cp_size: int) -> None:
    assert run_ranks(_check_all, cp_size, cp_size, timeout_s=120) == [34] * cp_size


def _mistakes(cp_size: int) -> dict[str, Callable[[], Any]]:
    """What the layout could get wrong; each as a patch."""

    def arange(cu_seqlens_padded: Tensor, cp_size: int) -> Tensor:
        return torch.arange(int(cu_seqlens_padded[-1]))

    real_sdpa, real_gather = cp_attention._sdpa, cp_attention._GatherSequence.backward

    def unmasked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        return real_sdpa(query, key, value, torch.ones(query.shape[1], key.shape[1], dtype=torch.bool), scale)

    def own_part(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        real_gather(ctx, gradient)
        return gradient.chunk(ctx.group.size())[ctx.group.rank()], None

    mistakes: dict[str, Callable[[], Any]] = {
        "not causal": lambda: mock.patch.object(cp_attention, "_sdpa", unmasked),
    }
    if cp_size > 1:
        mistakes |= {
            "zigzag not undone": lambda: mock.patch.object(cp_layout, "gathered_positions", arange),
            "key gradients not summed": lambda: mock.patch.object(
                cp_attention._GatherSequence, "backward", staticmethod(own_part)
            ),
        }
    return mistakes


def _check_what_is_noticed(cp_size: int) -> None:
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    lengths = packed_lengths(cp_size)["uneven"]
    for blocks in (False, True):
        for name, mistake in _mistakes(cp_size).items():
            with mistake(), in_blocks() if blocks else mock.patch.object(cp_attention, "_QUERY_BLOCK", 6):
                own = packed_error(lengths, 2, group)
            found: list[float] = [0.0] * group.size()
            dist.all_gather_object(found, own, group=group)
            assert max(found) > 1e-3, f"{name}, blocks={blocks}: not noticed"


@pytest.mark.parametrize("cp_size", [1, 2])
def test_mistakes_are_noticed(cp_size: int) -> None:
    run_ranks(_check_what_is_noticed, cp_size, cp_size, timeout_s=120)


def _memory_of_a_long_sequence(cp_size: int) -> tuple[int, int, int]:
    """(largest mask built, elements of masks saved for backward, mask rebuilds in backward) at 1,024 tokens."""
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    length, block = 1024, 64
    built: list[int] = []
    saved: list[int] = []
    real = cp_attention._sdpa

    def noting(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        assert mask is not None, "a long sequence went through in one piece"
        built.append(mask.numel())
        return real(query, key, value, mask, scale)

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() if tensor.dtype == torch.bool or tensor.numel() >= length * length // 16 else 0)
        return tensor

    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    rows = zigzag_rows(cu_seqlens, cp_size, group.rank())
    query, key, value, gradient = (tensor[rows].requires_grad_() for tensor in tensors([length], 2))
    limits = mock.patch.multiple(cp_attention, _LONGEST_BATCHED_LENGTH=256, _QUERY_BLOCK=block)
    with limits, mock.patch.object(cp_attention, "_sdpa", noting):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = attention(group)(query, key, value, packed_seq_params=packed_sequence_params(*[cu_seqlens] * 2))
        num_forward = len(built)
        output.backward(gradient.detach().flatten(1)[:, None])
    return max(built), sum(saved), len(built) - num_forward


@pytest.mark.parametrize("cp_size", [1, 2])
def test_a_long_sequence_never_holds_a_mask_of_its_whole_square(cp_size: int) -> None:
    for largest, saved, rebuilt in run_ranks(_memory_of_a_long_sequence, cp_size, cp_size, timeout_s=120):
        assert largest <= 64 * 1024
        assert saved == 0
        assert rebuilt == 1024 // cp_size // 64


def test_a_length_that_does_not_divide_into_chunks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"parallel\.cp=2 needs padded lengths divisible by 4; sequence 1 has 6"):
        cp_attention.build_layout(torch.tensor([0, 8, 14]), 2, 0)


def test_every_key_that_a_row_sees_is_of_its_own_sequence_and_past() -> None:
    cu_seqlens = torch.tensor([0, 24, 32, 72])
    for rank in range(2):
        layout = cp_attention.build_layout(cu_seqlens, 2, rank)
        rows = zigzag_rows(cu_seqlens, 2, rank)
        order = torch.cat([zigzag_rows(cu_seqlens, 2, r) for r in range(2)])
        sequence = torch.bucketize(torch.arange(72), cu_seqlens[1:], right=True)
        outputs = [
            (row, batch.key_rows[n][batch.mask[n, 0, q]])
            for batch in layout.batches
            if batch.mask is not None
            for n, row_of in enumerate(batch.query_rows.tolist())
            for q, row in enumerate(row_of)
        ]
        assert len(outputs) == sum(batch.query_rows.numel() for batch in layout.batches)
        for row, place in enumerate(layout.places.tolist()):
            query, keys = outputs[place]
            assert query == row
            position = int(rows[row])
            expected = torch.arange(int(cu_seqlens[sequence[position]]), position + 1)
            assert torch.equal(order[keys].sort().values, expected)
        assert len(layout.places) == len(rows)
