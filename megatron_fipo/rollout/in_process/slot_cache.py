"""A key-value cache with one slot per sequence, for transformers models.

Every slot holds its sequence from column 0 on, so rows of different length need no padding in front: what lies beyond a
row's length is masked. Rows join, leave and move one at a time, while transformers' own caches keep one length for all.

Shapes: B slots, N rows in use (the first N slots), H key-value heads, W columns, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

_COLUMN_BLOCK = 64


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [B, H, columns, D] each."""

    def __init__(self, num_slots: int) -> None:
        super().__init__()
        self.num_slots = num_slots
        self.num_columns = 0
        self.rows = torch.empty(0, dtype=torch.int64)
        self.lengths = torch.empty(0, dtype=torch.int64)
        self.width = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not empty: a masked column still enters attention, with weight 0, and 0 * NaN is NaN.
        num_heads = key_states.shape[1]
        self.keys = key_states.new_zeros(self.num_slots, num_heads, self.num_columns, key_states.shape[-1])
        self.values = value_states.new_zeros(self.num_slots, num_heads, self.num_columns, value_states.shape[-1])
        self.is_initialized = True

    def grow(self, num_columns: int) -> None:
        self.num_columns = num_columns
        if self.is_initialized:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_zeros(*old.shape[:2], num_columns, old.shape[-1])
                new[:, :, : old.shape[2]] = old
                setattr(self, name, new)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append one token to each row: key_states and value_states [N, H, 1, D]; returns [N, H, W, D] views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys[self.rows, :, self.lengths] = key_states[:, :, 0]
        self.values[self.rows, :, self.lengths] = value_states[:, :, 0]
        num_rows = len(self.rows)
        return self.keys[:num_rows, :, : self.width], self.values[:num_rows, :, : self.width]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0

    def get_seq_length(self) -> int:
        return self.width - 1

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):
    """Caches of all layers. Columns are added as sequences grow.

    Args:
        num_layers: layers of the model.
        num_slots: B, the most sequences at a time.
    """

    def __init__(self, num_layers: int, num_slots: int) -> None:
        self.slots = [_SlotLayer(num_slots) for _ in range(num_layers)]
        super().__init__(layers=self.slots)
        self.num_columns = 0

    def reserve(self, num_columns: int) -> None:
        """Make room for sequences of num_columns tokens; grows by at least a half, so that copying stays cheap."""
        if num_columns <= self.num_columns:
            return
        wanted = max(num_columns, self.num_columns * 3 // 2)
        self.num_columns = -(-wanted // _COLUMN_BLOCK) * _COLUMN_BLOCK
        for layer in self.slots:
            layer.grow(self.num_columns)

    def begin_step(self, rows: Tensor, lengths: Tensor, max_length: int) -> None:
        """Set where the next forward pass writes and what it reads.

        Args:
            rows: int64 [N], 0 … N - 1.
            lengths: int64 [N], tokens that each row has cached; the new one goes after them.
            max_length: the largest of them.
        """
        self.reserve(max_length + 1)
        for layer in self.slots:
            layer.rows, layer.lengths, layer.width = rows, lengths, max_length + 1

    def write(self, prefilled: DynamicCache, sources: Tensor, rows: Tensor) -> None:
        """Copy row sources[i] of a cache that a prefill filled into slot rows[i], for every i."""
        length = prefilled.get_seq_length()
        self.reserve(length)
        for layer, source in zip(self.slots, prefilled.layers, strict=True):
            if not layer.is_initialized:
                layer.lazy_initialization(source.keys, source.values)
            layer.keys[rows, :, :length] = source.keys[sources]
            layer.values[rows, :, :length] = source.values[sources]

    def copy(self, sources: Tensor, rows: Tensor, length: int) -> None:
        """Copy the first `length` columns of slot sources[i] into slot rows[i], for every i; the sets are disjoint."""
        for layer in self.slots:
            if layer.is_initialized:
                layer.keys[rows, :, :length] = layer.keys[sources, :, :length]
                layer.values[rows, :, :length] = layer.values[sources, :, :length]
