"""What SGLang's /weights_checker must answer for given weights, computed from the weights themselves.

It hashes every parameter as a whole, as a tensor-parallel rank holds it, so parts are kept until the others have come.
On the CPU the hash is the beginning of SHA-256; on a GPU it is SGLang's own, written anew here in PyTorch.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.rollout.servers.fused_layout import FusedLayout


class SglangExpectedChecksums:
    """`ExpectedChecksums` of dense decoders without quantization.

    Args:
        shape: shape of the model.
        tp: tensor-parallel size of the server.
        hashes_on_gpu: whether the server holds its weights on a GPU, where it uses another hash.
    """

    def __init__(self, shape: ModelShape, tp: int, *, hashes_on_gpu: bool) -> None:
        self._layout = FusedLayout(shape, tp)
        self._hashes_on_gpu = hashes_on_gpu
        self._checksums: dict[str, str] = {}
        self._sums: dict[str, Tensor] = {}
        """Hashes that still lie on the device: reading each by itself would wait for it thousands of times."""
        self._parts: dict[tuple[str, int], dict[int, Tensor]] = {}
        """Rows of each rank's parameters that are not whole yet, by the place of the first row."""

    @staticmethod
    def key(name: str, rank: int, tp: int) -> str:
        """Name of one rank's parameter."""
        return name if tp == 1 else f"{name} (rank {rank})"

    def add(self, name: str, tensor: Tensor) -> None:
        parameter, pieces = self._layout.place(name, tensor)
        for rank, piece in enumerate(pieces):
            if not self._layout.is_whole(parameter):
                # The stream may reuse its memory before the other parts come.
                self._parts.setdefault((parameter, rank), {})[piece.first_row] = piece.rows.clone()
                continue
            parts = self._parts.pop((parameter, rank), {}) | {piece.first_row: piece.rows}
            padding = piece.rows.new_zeros(piece.num_padding_rows, *piece.rows.shape[1:])
            whole = torch.cat([*(parts[first_row] for first_row in sorted(parts)), padding])
            key = self.key(parameter, rank, self._layout.tp)
            if self._hashes_on_gpu:
                self._sums[key] = gpu_hash_sum(whole)
            else:
                self._checksums[key] = sha_hash(whole)

    def expected(self) -> dict[str, str]:
        self._layout.check_whole()
        if self._sums:
            sums = torch.stack(list(self._sums.values())).tolist()
            self._checksums |= {key: _finish(value) for key, value in zip(self._sums, sums, strict=True)}
            self._sums = {}
        return self._checksums


def sha_hash(tensor: Tensor) -> str:
    """First 8 bytes of SHA-256 over the tensor's bytes, in hexadecimal: SGLang's hash of a CPU tensor."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()[:16]


_MASK = 0xFFFFFFFF
_SEED = 0x243F6A88
_SEEDS = (_SEED, ((_SEED * 0x9E3779B1) ^ 0xDEADBEEF) & _MASK)
_POSITION_FACTORS = (0x27D4EB2D, 0x165667B1)
_ROTATIONS = (15, 13)
_TILE_WORDS = 8192
_TILES_AT_A_TIME = 128


def gpu_hash(tensor: Tensor) -> str:
    """SGLang's 64-bit hash of a tensor on a GPU, in hexadecimal."""
    return _finish(int(gpu_hash_sum(tensor)))


def gpu_hash_sum(tensor: Tensor) -> Tensor:
    """The sum that SGLang's hash of a tensor on a GPU ends with; computed on the tensor's own device, never read here.

    Each 32-bit word is mixed with its position (murmur3's finalizer), words are summed within tiles of 8,192, tiles are
    mixed again and summed. Follows `sglang.kernels.ops.memory.gpu_tensor_hash` (0.5.23).

    Returns:
        0-d int64, modulo 2**64 in its 64 bits.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    if not raw.numel():
        return total
    if missing := -raw.numel() % 4:
        raw = torch.cat([raw, raw.new_zeros(missing)])
    words = raw.view(torch.int32)
    num_bytes = raw.numel() & _MASK
    step = _TILE_WORDS * _TILES_AT_A_TIME
    for start in range(0, len(words), step):
        chunk = words[start : start + step].long() & _MASK
        index = torch.arange(start, start + len(chunk), device=words.device)
        halves = []
        for seed, factor, rotation in zip(_SEEDS, _POSITION_FACTORS, _ROTATIONS, strict=True):
            rotated = ((index << rotation) | (index >> (32 - rotation))) & _MASK
            mixed = _mix(chunk ^ ((index * factor + seed) & _MASK) ^ rotated)
            padding = -len(mixed) % _TILE_WORDS
            tiles = torch.cat([mixed, mixed.new_zeros(padding)]).view(-1, _TILE_WORDS).sum(dim=1) & _MASK
            halves.append(_mix(tiles ^ num_bytes).sum())
        total += (halves[0] << 32) + halves[1]
    return total


def _mix(x: Tensor) -> Tensor:
    """murmur3's 32-bit finalizer on int64 that holds 32-bit values."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _finish(x: int) -> str:
    """splitmix64's finalizer of a sum, in hexadecimal."""
    mask = 2**64 - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return f"{x ^ (x >> 31):016x}"
