"""What SGLang's /weights_checker must answer for given weights, computed from the weights themselves.

It hashes every parameter as a tensor-parallel rank holds it: q, k and v in one tensor, gate and up in one, the
vocabulary padded with zero rows. On the CPU the hash is the beginning of SHA-256; on a GPU it is SGLang's own, written
anew here in PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

_FUSED = {
    "q_proj": ("qkv_proj", 0, 3),
    "k_proj": ("qkv_proj", 1, 3),
    "v_proj": ("qkv_proj", 2, 3),
    "gate_proj": ("gate_up_proj", 0, 2),
    "up_proj": ("gate_up_proj", 1, 2),
}
"""Linear layer -> the one that it is part of, its place in it, and how many parts that has."""
_SPLIT_BY_COLUMNS = ("o_proj", "down_proj")
_VOCABULARY = ("embed_tokens", "lm_head")
_VOCABULARY_MULTIPLE = 64


class SglangLedger:
    """A `ChecksumLedger` for dense decoders (Qwen2, Llama) without quantization.

    Args:
        model_path: folder whose config.json tells the number of key-value heads.
        tp: tensor-parallel size of the server.
        hashes_on_gpu: whether the server holds its weights on a GPU, where it uses another hash.
    """

    def __init__(self, model_path: str | Path, tp: int, *, hashes_on_gpu: bool) -> None:
        config = json.loads((Path(model_path) / "config.json").read_text(encoding="utf-8"))
        self._num_kv_heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        self._tp = tp
        self._hash = gpu_hash if hashes_on_gpu else sha_hash
        self._checksums: dict[str, str] = {}
        self._parts: dict[str, dict[int, Tensor]] = {}

    @staticmethod
    def key(name: str, rank: int, tp: int) -> str:
        """Name of one rank's parameter."""
        return name if tp == 1 else f"{name} (rank {rank})"

    def add(self, name: str, tensor: Tensor) -> None:
        layer = name.split(".")[-2] if "." in name else ""
        if layer not in _FUSED:
            self._note(name, [self._shard(tensor, layer, rank) for rank in range(self._tp)])
            return
        whole, place, num_parts = _FUSED[layer]
        fused_name = name.replace(layer, whole)
        parts = self._parts.setdefault(fused_name, {})
        parts[place] = tensor.clone()  # the stream may reuse its memory before the other parts come
        if len(parts) == num_parts:
            del self._parts[fused_name]
            shards = []
            for rank in range(self._tp):
                shards.append(torch.cat([self._part(parts[i], whole, i, rank) for i in range(num_parts)]))
            self._note(fused_name, shards)

    def expected(self) -> dict[str, str]:
        if self._parts:
            raise ValueError(f"parts of {', '.join(sorted(self._parts)[:3])} were not among the weights")
        return self._checksums

    def _note(self, name: str, shards: list[Tensor]) -> None:
        for rank, shard in enumerate(shards):
            self._checksums[self.key(name, rank, self._tp)] = self._hash(shard)

    def _part(self, tensor: Tensor, whole: str, place: int, rank: int) -> Tensor:
        if whole == "qkv_proj" and place > 0 and self._num_kv_heads < self._tp:
            copies = self._tp // self._num_kv_heads  # key-value heads are repeated where there are fewer than ranks
            return tensor.chunk(self._num_kv_heads)[rank // copies]
        return tensor.chunk(self._tp)[rank]

    def _shard(self, tensor: Tensor, layer: str, rank: int) -> Tensor:
        if layer in _SPLIT_BY_COLUMNS:
            return tensor.chunk(self._tp, dim=1)[rank]
        if layer in _VOCABULARY:
            multiple = _VOCABULARY_MULTIPLE
            padded = -(-len(tensor) // multiple) * multiple
            if padded % self._tp:
                multiple *= self._tp
                padded = -(-len(tensor) // multiple) * multiple
            rows = padded // self._tp
            shard = tensor[rank * rows : (rank + 1) * rows]
            return torch.cat([shard, shard.new_zeros(rows - len(shard), *shard.shape[1:])])
        return tensor


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
    """SGLang's 64-bit hash of a tensor on a GPU, in hexadecimal; computed on the tensor's own device.

    Each 32-bit word is mixed with its position (murmur3's finalizer), words are summed within tiles of 8,192, tiles are
    mixed again and summed. Follows `sglang.kernels.ops.memory.gpu_tensor_hash` (0.5.23).
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if not raw.numel():
        return f"{0:016x}"
    if missing := -raw.numel() % 4:
        raw = torch.cat([raw, raw.new_zeros(missing)])
    words = raw.view(torch.int32)
    num_bytes = raw.numel() & _MASK
    total = 0
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
            halves.append(int(_mix(tiles ^ num_bytes).sum()))
        total += (halves[0] << 32) + halves[1]
    return f"{_finish(total):016x}"


def _mix(x: Tensor) -> Tensor:
    """murmur3's 32-bit finalizer on int64 that holds 32-bit values."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _MASK
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)


def _finish(x: int) -> int:
    """splitmix64's finalizer."""
    mask = 2**64 - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)
