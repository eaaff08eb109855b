"""How the tensor-parallel ranks of SGLang and vLLM hold a dense decoder's weights, which is the same in both.

q, k and v are one parameter, gate and up another, and each rank has its rows of every part. o_proj and down_proj are
split by columns. The rows of the embedding and of the output layer are shared out after zero rows were added. All else
is on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape

_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Linear layer of the server -> the Hugging Face layers that it consists of, in the order of its rows."""
_PART_OF = {part: fused for fused, parts in _FUSED.items() for part in parts}
_SPLIT_BY_COLUMNS = ("o_proj.weight", "down_proj.weight")
_VOCABULARY = ("embed_tokens", "lm_head")
_VOCABULARY_MULTIPLE = 64
"""The vocabulary is padded to a multiple of this before its rows are shared out."""


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a tensor.

    Attributes:
        rows: a view of the tensor with the rank's rows, or with the rank's columns of all rows.
        first_row: the row of the rank's parameter at which they begin.
        num_padding_rows: how many zero rows the parameter has after them.
    """

    rows: Tensor
    first_row: int = 0
    num_padding_rows: int = 0


class FusedLayout:
    """Follows the weights of one update on their way into a server's parameters.

    Args:
        shape: shape of the model.
        tp: tensor-parallel size of the server.
    """

    def __init__(self, shape: ModelShape, tp: int) -> None:
        self.tp = tp
        self.dtypes: dict[str, torch.dtype] = {}
        """The dtype of every parameter that a tensor has come for, by the parameter's name."""
        self._shape = shape
        self._missing: dict[str, set[str]] = {}

    def place(self, name: str, tensor: Tensor) -> tuple[str, list[Piece]]:
        """Find where in the server's parameters a tensor goes.

        Args:
            name: its Hugging Face name.

        Returns:
            (name of the server's parameter, what each rank holds of the tensor, by rank). The list is empty for an
            output layer that the server computes with the embedding.

        Raises:
            ValueError: if its dtype is not that of the other parts of the parameter.
        """
        module, _, kind = name.rpartition(".")
        above, dot, layer = module.rpartition(".")
        fused = _PART_OF.get(layer)
        if fused is None:
            parameter = name
        else:
            parameter = f"{above}{dot}{fused}.{kind}"
            self._missing.setdefault(parameter, set(_FUSED[fused])).remove(layer)
        if layer == "lm_head" and self._shape.tied_embeddings:
            return parameter, []
        if self.dtypes.setdefault(parameter, tensor.dtype) != tensor.dtype:
            ours, others = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, self.dtypes[parameter]))
            raise ValueError(f"{name} is {ours}, but the other parts of {parameter} are {others}")
        return parameter, [self._piece(layer, kind, tensor, rank) for rank in range(self.tp)]

    def is_whole(self, parameter: str) -> bool:
        """Whether all parts of a parameter have come."""
        return not self._missing.get(parameter)

    def check_whole(self) -> None:
        """Refuse an update that lacks a part of a parameter.

        Raises:
            ValueError: naming the first such parameter and what it lacks.
        """
        if incomplete := {parameter: sorted(parts) for parameter, parts in self._missing.items() if parts}:
            parameter, parts = next(iter(incomplete.items()))
            raise ValueError(f"the weights lack {', '.join(parts)} of {parameter} ({len(incomplete)} such parameters)")

    def _piece(self, layer: str, kind: str, tensor: Tensor, rank: int) -> Piece:
        shape, tp = self._shape, self.tp
        if layer in _FUSED["qkv_proj"]:
            query_rows = shape.num_attention_heads // tp * shape.head_dim
            if layer == "q_proj":
                return Piece(tensor[rank * query_rows : (rank + 1) * query_rows])
            # With fewer key-value heads than ranks, several ranks hold the same head.
            rows = max(1, shape.num_query_groups // tp) * shape.head_dim
            first = rank * shape.num_query_groups // tp * shape.head_dim
            return Piece(tensor[first : first + rows], query_rows + (rows if layer == "v_proj" else 0))
        if layer in _FUSED["gate_up_proj"]:
            rows = len(tensor) // tp
            return Piece(tensor[rank * rows : (rank + 1) * rows], rows if layer == "up_proj" else 0)
        if f"{layer}.{kind}" in _SPLIT_BY_COLUMNS:
            columns = tensor.shape[1] // tp
            return Piece(tensor[:, rank * columns : (rank + 1) * columns])
        if layer in _VOCABULARY:
            rows = _padded_vocabulary(len(tensor), tp) // tp
            held = tensor[rank * rows : (rank + 1) * rows]
            return Piece(held, num_padding_rows=rows - len(held))
        return Piece(tensor)


def _padded_vocabulary(rows: int, tp: int) -> int:
    """Number of rows that SGLang shares out. vLLM shares out as many, or does not start: tp must divide them."""
    padded = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    if padded % tp:
        multiple = _VOCABULARY_MULTIPLE * tp
        padded = -(-rows // multiple) * multiple
    return padded
