"""Weights in and out of a sharded Megatron model, one tensor at a time, under Hugging Face names.

`load_weights` fills a model from a Hugging Face folder; `weight_stream` yields a model's weights as Hugging Face
tensors. The stream feeds rollout engines and exports alike, and never holds more than one parameter in whole.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fipo.convert.families import find_row
from megatron_fipo.convert.families.row import Parameter
from megatron_fipo.convert.hf_folder import CheckpointReader
from megatron_fipo.convert.hf_writer import (
    DEFAULT_SHARD_BYTES,
    ShardWriter,
    copy_model_files,
    own_memory,
    partial_of,
)
from megatron_fipo.convert.model_shape import ModelShape
from megatron_fipo.convert.problems import NotFiniteError, Problem, not_finite
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.system.disk import put_folder_in_place

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+")

HEAD = "head"
"""Name of a model chunk's submodule with parameters that no Hugging Face model has; they are not streamed."""


@dataclass(frozen=True)
class _Held:
    """A parameter of the model, and this rank's part of it."""

    parameter: Parameter
    tensor: Tensor


Named = Callable[[Any], Iterable[tuple[str, Tensor]]]
"""Gives a model chunk's tensors under the names of its parameters."""


def _held_parameters(
    chunks: Sequence[nn.Module], shape: ModelShape, named: Named = nn.Module.named_parameters
) -> list[_Held]:
    """The parameters that this rank holds, except a tied output layer's (a copy of the embedding) and a head's."""
    found = []
    for chunk in chunks:
        layers = {str(i): str(layer.layer_number - 1) for i, layer in enumerate(chunk.decoder.layers)}  # type: ignore
        for name, tensor in named(chunk):
            if (name == "output_layer.weight" and shape.tied_embeddings) or name.startswith(f"{HEAD}."):
                continue
            local = _LAYER.search(name)
            global_name = _LAYER.sub(layers[local.group()], name) if local else name
            found.append(_Held(find_row(shape, global_name), tensor))
    return found


@torch.no_grad()
def load_weights(
    chunks: Sequence[nn.Module], folder: str | Path, shape: ModelShape, *, tp_size: int, tp_rank: int
) -> None:
    """Fill this rank's model chunks from a Hugging Face folder. No communication.

    Raises:
        ValueError: if the folder does not hold exactly the model that its config.json describes, or a weight that this
            rank's chunks need is NaN or infinite.
    """
    reader = CheckpointReader(folder, shape)
    problems: list[Problem] = []
    for held in _held_parameters(chunks, shape):
        whole = [reader.read(name) for name in held.parameter.names]
        for name, tensor in zip(held.parameter.names, whole, strict=True):
            problems += not_finite(name, reader.place(name), tensor)
        _fill(held.tensor, held.parameter, whole, shape, tp_size, tp_rank)
    if problems:
        raise NotFiniteError(Path(folder), problems)
    if shape.tied_embeddings:
        _fill_tied_output(chunks, reader, shape, tp_size, tp_rank)


def _fill_tied_output(
    chunks: Sequence[nn.Module], reader: CheckpointReader, shape: ModelShape, tp_size: int, tp_rank: int
) -> None:
    """Fill the copy of the embedding that the last pipeline stage holds as its output layer."""
    for chunk in chunks:
        for name, tensor in chunk.named_parameters():
            if name == "output_layer.weight":
                embedding = find_row(shape, "embedding.word_embeddings.weight")
                _fill(tensor, embedding, [reader.read(embedding.names[0])], shape, tp_size, tp_rank)


def _fill(
    tensor: Tensor, parameter: Parameter, whole: list[Tensor], shape: ModelShape, tp_size: int, tp_rank: int
) -> None:
    num_shards = parameter.num_shards(tp_size)
    shard = parameter.layout.to_shard(whole, shape, num_shards, tp_rank if num_shards > 1 else 0)
    assert shard.shape == tensor.shape, (
        f"{parameter.megatron}: shard {tuple(shard.shape)}, parameter {tuple(tensor.shape)}"
    )
    tensor.copy_(shard)


@torch.no_grad()
def weight_stream(
    chunks: Sequence[nn.Module],
    ranks: ParallelGroups,
    shape: ModelShape,
    named: Named = nn.Module.named_parameters,
) -> Iterator[tuple[str, Tensor]]:
    """The model's weights as whole Hugging Face tensors, in the model's dtype, on every rank.

    Collective over the tensor- and pipeline-parallel groups: every rank must drain it. Tensors may share memory with
    the model; copy what is kept.

    Args:
        named: gives the tensors of a chunk to stream: its parameters, or others of the same names and sizes.

    Yields:
        (Hugging Face name, tensor), each name once.
    """
    own = _held_parameters(chunks, shape, named)
    catalogue = exchange.all_gather_objects(
        [(held.parameter.megatron, tuple(held.tensor.shape), held.tensor.dtype) for held in own], ranks.pp
    )
    device = next(iter(own)).tensor.device
    for stage, entries in enumerate(catalogue):
        for index, (megatron_name, local_shape, dtype) in enumerate(entries):
            parameter = find_row(shape, megatron_name)
            is_owner = stage == ranks.pp.rank()
            source = own[index].tensor.detach() if is_owner else torch.empty(local_shape, dtype=dtype, device=device)
            source = exchange.broadcast(source, stage, ranks.pp)
            is_cut = parameter.num_shards(ranks.tp.size()) > 1
            shards = exchange.all_gather_tensors(source, ranks.tp) if is_cut else [source]
            yield from zip(parameter.names, parameter.layout.to_whole(shards, shape), strict=True)


def export_folder(
    stream: Iterator[tuple[str, Tensor]],
    base_folder: str | Path,
    folder: str | Path,
    *,
    is_writer: bool,
    dtype: torch.dtype,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write a weight stream as a Hugging Face folder; config and tokenizer are those of the base model.

    Every rank drains the stream; the writer holds one file's tensors at a time. The folder appears whole or not at all.

    Args:
        stream: see `weight_stream`.
        base_folder: the folder that training started from.
        folder: where to write; replaced if it exists.
        is_writer: whether this rank writes.
        dtype: dtype of the written weights, also noted in config.json.
        shard_bytes: size of a weight file; see `ShardWriter`.

    Raises:
        OSError: on the writer, if the disk is full or not writable; what `folder` held before is still there.
    """
    if not is_writer:
        for _ in stream:
            pass
        return
    target = Path(folder)
    partial = partial_of(target)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_model_files(Path(base_folder), partial, dtype)
    writer = ShardWriter(partial, shard_bytes)
    for name, tensor in stream:
        writer.add(name, own_memory(tensor.to(dtype)))
    writer.finish()
    put_folder_in_place(partial, target)
