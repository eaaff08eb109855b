"""What vLLM's workers must answer to `fipo_checksums` for given weights, computed from the weights themselves.

A tensor-parallel rank holds q, k and v as one parameter, gate and up as one, and its rows or columns of each. Digests
add up, so a piece is noted when it comes, and nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.rollout.server_plugins.megatron_fipo_vllm.digest import digest, label

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_PART_OF = {part: fused for fused, parts in _FUSED.items() for part in parts}
_SPLIT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
_VOCABULARY = ("embed_tokens", "lm_head")
_VOCABULARY_MULTIPLE = 64
"""vLLM pads the vocabulary to a multiple of this, with zeros, before it shares the rows out."""


class VllmLedger:
    """A `ChecksumLedger` for dense decoders without quantization.

    Args:
        shape: of the model.
        tp: tensor-parallel size of the server.
    """

    def __init__(self, shape: ModelShape, tp: int) -> None:
        self._shape, self._tp = shape, tp
        self._digests: dict[tuple[str, int], int] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        self._missing: dict[str, set[str]] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        *before, layer, kind = name.split(".")
        if layer == "lm_head" and self._shape.tied_embeddings:
            return  # the server computes the output with the embedding
        fused = _PART_OF.get(layer)
        held = name
        if fused is not None:
            held = ".".join([*before, fused, kind])
            self._missing.setdefault(held, set(_FUSED[fused])).remove(layer)
        if self._dtypes.setdefault(held, tensor.dtype) != tensor.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, what {held} also consists of is {self._dtypes[held]}")
        for rank, (piece, first_row) in enumerate(self._pieces(layer, kind, tensor)):
            start = first_row * (piece.shape[1] if piece.dim() == 2 else 1)
            self._digests[held, rank] = (self._digests.get((held, rank), 0) + digest(piece, start)) % 2**64

    def expected(self) -> dict[str, str]:
        if incomplete := {held: sorted(parts) for held, parts in self._missing.items() if parts}:
            held, parts = next(iter(incomplete.items()))
            raise ValueError(f"the weights lack {', '.join(parts)} of {held} ({len(incomplete)} such parameters)")
        return {
            f"{name} (rank {rank})": label(value, self._dtypes[name]) for (name, rank), value in self._digests.items()
        }

    def _pieces(self, layer: str, kind: str, tensor: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Each rank's rows or columns, and the row of the server's parameter at which they begin."""
        shape, tp = self._shape, self._tp
        for rank in range(tp):
            if layer in _FUSED["qkv_proj"]:
                query_rows = shape.num_attention_heads // tp * shape.head_dim
                # With fewer key-value heads than ranks, several ranks hold the same head.
                kv_heads = max(1, shape.num_query_groups // tp)
                kv_rows = kv_heads * shape.head_dim
                if layer == "q_proj":
                    yield tensor[rank * query_rows : (rank + 1) * query_rows], 0
                else:
                    first = rank * shape.num_query_groups // tp * shape.head_dim
                    yield tensor[first : first + kv_rows], query_rows + (kv_rows if layer == "v_proj" else 0)
            elif layer in _FUSED["gate_up_proj"]:
                rows = len(tensor) // tp
                yield tensor[rank * rows : (rank + 1) * rows], rows if layer == "up_proj" else 0
            elif f"{layer}.{kind}" in _SPLIT_BY_COLUMNS:
                columns = tensor.shape[1] // tp
                yield tensor[:, rank * columns : (rank + 1) * columns], 0
            elif layer in _VOCABULARY:
                rows = -(-len(tensor) // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE // tp
                yield tensor[rank * rows : (rank + 1) * rows], 0
            else:
                yield tensor, 0
