"""Causal self-attention over packed, context-parallel sequences where Transformer Engine is not.

A drop-in for Megatron-Core's `core_attention`, whose own version knows neither packed sequences nor context
parallelism. Keys and values are all-gathered over the context-parallel group (reduce-scattered in backward); each rank
attends from its own zigzag chunks. The layout is worked out once a microbatch and shared by all layers.

In half precision on a GPU one call of a flash kernel does it (`varlen_attention`). Elsewhere there are two ways of
computing the same, chosen by length:
- short sequences of like length are padded into batches, one scaled_dot_product_attention call each;
- a long sequence goes chunk by chunk in blocks of queries, each against the keys up to its own end, its mask built and
  dropped inside an activation checkpoint: no mask of S x S is ever held.

Shapes: T packed tokens, T_local = T / cp, h query heads, g key-value heads, d channels a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from megatron_fipo.parallel import cp_layout
from megatron_fipo.parallel.varlen_attention import VarlenLayout, attend_varlen, build_varlen_layout, kernel_for
from megatron_fipo.rl.segments import to_device

_LONGEST_BATCHED_LENGTH = 2048
_QUERY_BLOCK = 1024


class _GatherSequence(torch.autograd.Function):
    """All-gather along dim 0; reduce-scatter in backward."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = local.new_empty(group.size() * local.shape[0], *local.shape[1:])
        dist.all_gather_into_tensor(gathered, local.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        local = gradient.new_empty(gradient.shape[0] // ctx.group.size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(local, gradient, group=ctx.group)
        return local, None


@dataclass(frozen=True)
class _Batch:
    """Sequences of like length, attended to together.

    Attributes:
        query_rows: int64 [n, Q] local rows; beyond a sequence's end row 0, whose output here nothing reads.
        key_rows: int64 [n, K] rows of the gathered keys, 0 beyond the end (masked, or causally out of reach).
        mask: bool [n, 1, Q, K], True where a query may look; None where queries and keys are the same whole sequences.
    """

    query_rows: Tensor
    key_rows: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class _Block:
    """Consecutive queries of one long sequence: local rows [start, stop) against all keys up to the last query's."""

    start: int
    stop: int
    key_rows: Tensor


@dataclass(frozen=True)
class AttentionLayout:
    """Which queries meet which keys on one rank; the same for every layer of a microbatch.

    Attributes:
        places: int64 [T_local], where each local row is among the outputs of all batches and then all blocks, padding
            included. Every row is in exactly one of them.
    """

    batches: list[_Batch]
    blocks: list[_Block]
    places: Tensor


def build_layout(
    cu_seqlens_padded: Tensor, cp_size: int, cp_rank: int, device: torch.device | None = None
) -> AttentionLayout:
    """Layout of packed sequences.

    Args:
        cu_seqlens_padded: int [S + 1], global cumulative padded lengths, each divisible by 2*cp; on the CPU, or a
            device is waited for.
        device: where the layout is to lie; None takes that of cu_seqlens_padded.

    Raises:
        ValueError: if a length does not divide into the chunks.
    """
    cp_layout.check_padded(cu_seqlens_padded, cp_size)
    device = device or cu_seqlens_padded.device
    gathered_row = to_device(torch.argsort(cp_layout.gathered_positions(cu_seqlens_padded, cp_size)), device)
    local_positions = to_device(cp_layout.local_indices(cu_seqlens_padded, cp_size, cp_rank), device)
    starts = cu_seqlens_padded.long().tolist()
    lengths = cu_seqlens_padded.diff().tolist()
    batches, blocks = [], []
    places = torch.empty_like(local_positions)
    num_outputs = 0
    for members in _like_lengths(lengths):
        batch, is_query = _batch(members, starts, lengths, gathered_row, local_positions, cp_size)
        outputs = num_outputs + torch.arange(is_query.numel(), device=device).view_as(is_query)
        places[batch.query_rows[is_query]] = outputs[is_query]
        num_outputs += is_query.numel()
        batches.append(batch)
    for index, length in enumerate(lengths):
        if length > _LONGEST_BATCHED_LENGTH:
            blocks += _blocks(starts[index], length, gathered_row, cp_size, cp_rank)
    for block in blocks:
        num_queries = block.stop - block.start
        places[block.start : block.stop] = num_outputs + torch.arange(num_queries, device=device)
        num_outputs += num_queries
    return AttentionLayout(batches, blocks, places)


def _like_lengths(lengths: list[int]) -> list[list[int]]:
    """Sequences short enough to be batched, in sets whose lengths differ at most by half of the longest."""
    short = [index for index, length in enumerate(lengths) if 0 < length <= _LONGEST_BATCHED_LENGTH]
    short.sort(key=lengths.__getitem__)
    sets: list[list[int]] = []
    for index in reversed(short):
        if sets and lengths[index] * 2 >= lengths[sets[-1][0]]:
            sets[-1].append(index)
        else:
            sets.append([index])
    return sets


def _batch(
    members: list[int],
    starts: list[int],
    lengths: list[int],
    gathered_row: Tensor,
    local_positions: Tensor,
    cp_size: int,
) -> tuple[_Batch, Tensor]:
    """The batch, and which of its queries are rows and no padding: bool [n, Q]."""
    device = gathered_row.device
    first = to_device(torch.tensor([starts[i] for i in members]), device)[:, None]
    length = to_device(torch.tensor([lengths[i] for i in members]), device)[:, None]
    longest = max(lengths[i] for i in members)
    key_offsets = torch.arange(longest, device=device)[None]
    key_rows = torch.where(
        key_offsets < length, gathered_row[(first + key_offsets).clamp(max=len(gathered_row) - 1)], 0
    )
    query_offsets = torch.arange(longest // cp_size, device=device)[None]
    is_query = query_offsets < length // cp_size
    query_rows = torch.where(is_query, first // cp_size + query_offsets, 0)
    if cp_size == 1:
        return _Batch(query_rows, key_rows, None), is_query
    query_position = local_positions[query_rows] - first
    mask = key_offsets[:, None, :] <= torch.where(is_query, query_position, 0)[:, :, None]
    return _Batch(query_rows, key_rows, mask[:, None]), is_query


def _blocks(first: int, length: int, gathered_row: Tensor, cp_size: int, cp_rank: int) -> list[_Block]:
    num_chunks = cp_layout.num_chunks_of(cp_size)
    chunk = length // num_chunks
    mine = [0] if cp_size == 1 else [cp_rank, num_chunks - 1 - cp_rank]
    blocks = []
    for slot, position in enumerate(mine):
        local_start = first // cp_size + slot * chunk
        for offset in range(0, chunk, _QUERY_BLOCK):
            stop = min(offset + _QUERY_BLOCK, chunk)
            key_rows = gathered_row[first : first + position * chunk + stop]
            blocks.append(_Block(local_start + offset, local_start + stop, key_rows))
    return blocks


def attend(query: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, scale: float) -> Tensor:
    """Attention of this rank's rows.

    Args:
        query: [T_local, h, d]. key, value: [T, g, d], in the order in which ranks' rows are gathered.

    Returns:
        [T_local, h, d].
    """
    attended = []
    for batch in layout.batches:
        queries, keys, values = query[batch.query_rows], key[batch.key_rows], value[batch.key_rows]
        attended.append(_sdpa(queries, keys, values, batch.mask, scale).flatten(0, 1))
    for block in layout.blocks:
        queries = query[block.start : block.stop]
        arguments = (queries, key, value, block.key_rows, scale)
        attended.append(checkpoint(_attend_block, *arguments, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(attended)[layout.places]


def _attend_block(query: Tensor, key: Tensor, value: Tensor, key_rows: Tensor, scale: float) -> Tensor:
    num_queries, num_keys = len(query), len(key_rows)
    # The last query sees every key, the one before all but one, and so on.
    if kernel_for(query.is_cuda, query.dtype, query.shape[-1]) == "masked":
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(num_keys - num_queries)
        mask = mask[None, None]
    else:  # said in words, which a flash kernel understands: it takes no mask
        mask = causal_lower_right(num_queries, num_keys)
    return _sdpa(query[None], key[key_rows][None], value[key_rows][None], mask, scale)[0]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """[n, Q, h, d] against [n, K, g, d] -> [n, Q, h, d]; causal where there is no mask."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    attended = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )
    return attended.transpose(1, 2)


class ContextParallelAttention(MegatronModule):
    """Megatron's `core_attention`, packed (THD) and plain (SBHD), for any context-parallel size.

    Differentiable; collective over the context-parallel group. Attention dropout must be 0.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        assert not dropout, "attention dropout is not supported"
        assert pg_collection is not None, "the context-parallel group is needed"
        self.cp_group: ProcessGroup = pg_collection.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Attend.

        Args:
            query: [T_local, h, d] or [T_local, 1, h, d] packed, or [L / cp, B, h, d].
            key, value: the same with g heads.
            packed_seq_params: `actor.model.packed_sequence_params`; None for a plain batch.

        Returns:
            [T_local, 1, h * d], or [L / cp, B, h * d].
        """
        plain_shape = query.shape[:2] if packed_seq_params is None else None
        if query.dim() == 4:
            query, key, value = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
        layout = self._layout(query, packed_seq_params, plain_shape)
        if self.cp_group.size() > 1:
            gathered = _GatherSequence.apply(torch.cat([key, value], dim=-1), self.cp_group)
            key, value = gathered.split([key.shape[-1], value.shape[-1]], dim=-1)
        if isinstance(layout, VarlenLayout):
            output = attend_varlen(query, key, value, layout, self.scale).flatten(1)
        else:
            output = attend(query, key, value, layout, self.scale).flatten(1)
        if plain_shape is None:
            return output.unsqueeze(1)
        length, batch_size = plain_shape
        return output.view(batch_size, length, -1).transpose(0, 1).contiguous()

    def _layout(self, query: Tensor, packed_seq_params: Any, plain_shape: Any) -> AttentionLayout | VarlenLayout:
        """The microbatch's layout, kept on its packed_seq_params so that every layer, and recompute, shares it."""
        if packed_seq_params is not None:
            layout = getattr(packed_seq_params, "attention_layout", None)
            if layout is None:
                layout = self._build_layout(
                    query,
                    packed_seq_params.cu_seqlens_on_host,
                    packed_seq_params.max_seqlen_q,
                    packed_seq_params.cu_seqlens_q_padded,
                )
                packed_seq_params.attention_layout = layout
            return layout
        length, batch_size = plain_shape
        whole = length * self.cp_group.size()
        return self._build_layout(query, torch.arange(batch_size + 1) * whole, whole)

    def _build_layout(
        self, query: Tensor, cu_seqlens: Tensor, longest: int, on_device: Tensor | None = None
    ) -> AttentionLayout | VarlenLayout:
        """Make it from cumulative lengths on the CPU; `on_device` are the same lengths on the device of the queries."""
        cp_size, cp_rank = self.cp_group.size(), self.cp_group.rank()
        if kernel_for(query.is_cuda, query.dtype, query.shape[-1]) == "varlen":
            if cp_size == 1 and on_device is not None:  # as they lie: nothing is to be copied
                cu_seqlens = on_device
            return build_varlen_layout(cu_seqlens, longest, cp_size, cp_rank, query.device)
        return build_layout(cu_seqlens, cp_size, cp_rank, query.device)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        """No parameters, nothing to save."""
        return {}
