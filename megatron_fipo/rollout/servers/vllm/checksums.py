"""What vLLM's workers must answer to `fipo_checksums` for given weights, computed from the weights themselves.

Digests add up, so a piece is added when it comes, and no weights are kept. Sums stay on the weights' device until all
have come: reading each would wait for the device thousands of times.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.rollout.servers.fused_layout import FusedLayout
from megatron_fipo.rollout.servers.plugins.megatron_fipo_vllm.digest import digest_sum, label


class VllmExpectedChecksums:
    """`ExpectedChecksums` of dense decoders without quantization.

    Args:
        shape: shape of the model.
        tp: tensor-parallel size of the server.
    """

    def __init__(self, shape: ModelShape, tp: int) -> None:
        self._layout = FusedLayout(shape, tp)
        self._sums: dict[tuple[str, int], Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        parameter, pieces = self._layout.place(name, tensor)
        for rank, piece in enumerate(pieces):
            start = piece.first_row * (piece.rows.shape[1] if piece.rows.dim() == 2 else 1)
            found = digest_sum(piece.rows, start)
            before = self._sums.get((parameter, rank))
            self._sums[parameter, rank] = found if before is None else before + found

    def expected(self) -> dict[str, str]:
        self._layout.check_whole()
        sums = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        return {
            f"{name} (rank {rank})": label(value % 2**64, self._layout.dtypes[name])
            for (name, rank), value in zip(self._sums, sums, strict=True)
        }
