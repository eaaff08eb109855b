"""Weights in and out of a sharded Megatron model, one tensor at a time, under Hugging Face names.

`load_weights` fills a model from a Hugging Face folder; `weight_stream` yields a model's weights as Hugging Face
tensors. The stream feeds rollout engines and exports alike, and never holds more than one parameter in whole.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_fipo.convert.families import expected_tensors, find_row
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.convert.mapping import Row
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")
_NOT_WEIGHTS = {".safetensors", ".bin", ".pt", ".gguf"}


@dataclass(frozen=True)
class _Parameter:
    """A parameter of this rank's part of the model."""

    row: Row
    tensor: nn.Parameter


def _parameters(chunks: Sequence[nn.Module], shape: ModelShape) -> list[_Parameter]:
    """Parameters of this rank with their rows; a tied output layer, a copy of the embedding, is left out."""
    found = []
    for chunk in chunks:
        layers = {str(i): layer.layer_number - 1 for i, layer in enumerate(chunk.decoder.layers)}  # type: ignore
        for name, tensor in chunk.named_parameters():
            if name == "output_layer.weight" and shape.tied_embeddings:
                continue
            local = _LAYER.search(name)
            layer = layers[local.group()] if local else None
            found.append(_Parameter(find_row(shape.family, _LAYER.sub("{layer}", name), layer), tensor))
    return found


class CheckpointReader:
    """The tensors of a Hugging Face folder, read one at a time.

    Raises:
        ValueError: if the folder's tensors are not those that its config.json describes, naming the first that are
            missing, unexpected or of another shape.
    """

    def __init__(self, folder: str | Path, shape: ModelShape) -> None:
        self.folder = Path(folder)
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise ValueError(f"{folder} holds no *.safetensors file; model.path needs weights in that format.")
        self._handles = [safe_open(file, framework="pt") for file in files]
        self._owner = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118
        self._check(expected_tensors(shape), shape)

    def _check(self, expected: dict[str, tuple[int, ...]], shape: ModelShape) -> None:
        allowed = {"lm_head.weight"} if shape.tied_embeddings else set()
        missing = sorted(expected.keys() - self._owner.keys())
        extra = sorted(self._owner.keys() - expected.keys() - allowed)
        if missing or extra:
            raise ValueError(
                f"{self.folder}: the weights do not fit config.json. Missing: {_first(missing)}; unexpected: "
                f"{_first(extra)}. The folder must hold one whole {shape.family} model."
            )
        for name, size in expected.items():
            found = tuple(self._owner[name].get_slice(name).get_shape())
            if found != size:
                raise ValueError(f"{self.folder}: tensor {name} has shape {found}; config.json implies {size}.")

    def read(self, name: str) -> Tensor:
        """One whole tensor, in the file's dtype."""
        return self._owner[name].get_tensor(name)


def _first(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "none"


@torch.no_grad()
def load_weights(
    chunks: Sequence[nn.Module], folder: str | Path, shape: ModelShape, *, tp_size: int, tp_rank: int
) -> None:
    """Fill this rank's model chunks from a Hugging Face folder. No communication.

    Raises:
        ValueError: if the folder does not hold exactly the model that its config.json describes.
    """
    reader = CheckpointReader(folder, shape)
    for parameter in _parameters(chunks, shape):
        whole = [reader.read(name) for name in parameter.row.hugging_face]
        _fill(parameter.tensor, parameter.row, whole, shape, tp_size, tp_rank)
    if shape.tied_embeddings:
        _fill_tied_output(chunks, reader, shape, tp_size, tp_rank)


def _fill_tied_output(
    chunks: Sequence[nn.Module], reader: CheckpointReader, shape: ModelShape, tp_size: int, tp_rank: int
) -> None:
    """Under pipeline parallelism the last stage holds a copy of the embedding as its output layer."""
    for chunk in chunks:
        for name, tensor in chunk.named_parameters():
            if name == "output_layer.weight":
                row = find_row(shape.family, "embedding.word_embeddings.weight", None)
                _fill(tensor, row, [reader.read(row.hugging_face[0])], shape, tp_size, tp_rank)


def _fill(tensor: Tensor, row: Row, whole: list[Tensor], shape: ModelShape, tp_size: int, tp_rank: int) -> None:
    shard = row.layout.to_shard(whole, shape, tp_size, tp_rank)
    assert shard.shape == tensor.shape, f"{row.megatron}: shard {tuple(shard.shape)}, parameter {tuple(tensor.shape)}"
    tensor.copy_(shard)


@torch.no_grad()
def weight_stream(
    chunks: Sequence[nn.Module], groups: ParallelGroups, shape: ModelShape
) -> Iterator[tuple[str, Tensor]]:
    """The model's weights as whole Hugging Face tensors, in the model's dtype, on every rank.

    Collective over the tensor- and pipeline-parallel groups: every rank must drain it. Tensors may share memory with
    the model; copy what is kept.

    Yields:
        (Hugging Face name, tensor), each name once.
    """
    own = _parameters(chunks, shape)
    catalogue = exchange.all_gather_objects(
        [(parameter.row, tuple(parameter.tensor.shape), parameter.tensor.dtype) for parameter in own], groups.pp
    )
    device = next(iter(own)).tensor.device
    for stage, entries in enumerate(catalogue):
        for index, (row, local_shape, dtype) in enumerate(entries):
            is_owner = stage == groups.pp.rank()
            source = own[index].tensor.detach() if is_owner else torch.empty(local_shape, dtype=dtype, device=device)
            source = exchange.broadcast(source, stage, groups.pp)
            shards = exchange.all_gather_tensors(source, groups.tp)
            yield from zip(row.hugging_face, row.layout.to_whole(shards, shape), strict=True)


def export_folder(
    stream: Iterator[tuple[str, Tensor]],
    base_folder: str | Path,
    folder: str | Path,
    *,
    is_writer: bool,
    dtype: torch.dtype,
) -> None:
    """Write a weight stream as a Hugging Face folder; config and tokenizer are those of the base model.

    Every rank drains the stream; the writer collects it and writes. The folder appears whole or not at all.

    Args:
        stream: see `weight_stream`.
        base_folder: the folder that training started from.
        folder: where to write; replaced if it exists.
        is_writer: whether this rank writes.
        dtype: dtype of the written weights, also noted in config.json.
    """
    tensors = {name: tensor.to(dtype).cpu().contiguous().clone() for name, tensor in stream if is_writer}
    if not is_writer:
        return
    target = Path(folder)
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for file in Path(base_folder).iterdir():
        if file.is_file() and file.suffix not in _NOT_WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copy2(file, partial / file.name)
    _note_dtype(partial / "config.json", dtype)
    save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def _note_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
