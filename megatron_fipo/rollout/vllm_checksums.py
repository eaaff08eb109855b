"""What vLLM's workers must answer to `fipo_checksums` for given weights, computed from the weights themselves.

Digests add up, so a piece is noted when it comes, and nothing is kept.
"""

from __future__ import annotations

from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.rollout.fused_layout import FusedLayout
from megatron_fipo.rollout.server_plugins.megatron_fipo_vllm.digest import digest, label


class VllmLedger:
    """A `ChecksumLedger` for dense decoders without quantization.

    Args:
        shape: of the model.
        tp: tensor-parallel size of the server.
    """

    def __init__(self, shape: ModelShape, tp: int) -> None:
        self._layout = FusedLayout(shape, tp)
        self._digests: dict[tuple[str, int], int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        parameter, pieces = self._layout.place(name, tensor)
        for rank, piece in enumerate(pieces):
            start = piece.first_row * (piece.rows.shape[1] if piece.rows.dim() == 2 else 1)
            sum_before = self._digests.get((parameter, rank), 0)
            self._digests[parameter, rank] = (sum_before + digest(piece.rows, start)) % 2**64

    def expected(self) -> dict[str, str]:
        self._layout.check_whole()
        return {
            f"{name} (rank {rank})": label(value, self._layout.dtypes[name])
            for (name, rank), value in self._digests.items()
        }
