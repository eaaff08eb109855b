"""Numbers of parameters, exactly: of a whole model, and of one rank of a layout.

Biases, norms and the padding of the vocabulary are counted. Tensor parallelism shards matrices and the projections'
biases; norms are on every rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fipo.config import ParallelSection
from megatron_fipo.convert.hf_config import ModelShape


def whole_parameters(shape: ModelShape) -> int:
    """Parameters of the Hugging Face checkpoint: no padding, a tied output layer counted once."""
    sharded, replicated = layer_parameters(shape)
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tied_embeddings else 2)
    return embeddings + shape.num_layers * (sharded + replicated) + shape.hidden_size


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters that a token is multiplied with: every matrix but the embedding, the output layer included."""
    return shape.num_layers * sum(layer_matrices(shape)) + shape.vocab_size * shape.hidden_size


def layer_parameters(shape: ModelShape) -> tuple[int, int]:
    """(those that tensor parallelism shards, those on every rank) of one layer."""
    biases = (shape.num_attention_heads + 2 * shape.num_query_groups) * shape.head_dim if shape.qkv_bias else 0
    replicated = 2 * shape.hidden_size
    if shape.output_bias:
        replicated += shape.hidden_size
    if shape.qk_norm:
        replicated += 2 * shape.head_dim
    return sum(layer_matrices(shape)) + biases, replicated


def layer_matrices(shape: ModelShape) -> tuple[int, int]:
    """(the attention's, the MLP's) parameters in matrices of one layer."""
    heads = 2 * shape.num_attention_heads + 2 * shape.num_query_groups  # queries and output; keys and values
    return shape.hidden_size * heads * shape.head_dim, shape.hidden_size * 3 * shape.ffn_hidden_size


@dataclass(frozen=True)
class StageParameters:
    """What each rank of one pipeline stage holds.

    Attributes:
        stage: from 0.
        num_layers: of the stage, all its virtual stages together.
        parameters: on one tensor-parallel rank, vocabulary padding included.
        output_rows: rows of the output layer on one tensor-parallel rank; 0 where the pipeline does not end.
    """

    stage: int
    num_layers: int
    parameters: int
    output_rows: int


def stage_parameters(shape: ModelShape, parallel: ParallelSection) -> list[StageParameters]:
    """Of every pipeline stage, in order. The layout must divide the model (`validate_model_layout`)."""
    sharded, replicated = layer_parameters(shape)
    layers = shape.num_layers // parallel.pp
    rows = shape.padded_vocab_size(parallel.tp) // parallel.tp
    stages = []
    for stage in range(parallel.pp):
        is_first, is_last = stage == 0, stage == parallel.pp - 1
        count = layers * (sharded // parallel.tp + replicated)
        if is_first:
            count += rows * shape.hidden_size
        if is_last:
            count += shape.hidden_size  # the final norm
            if not (is_first and shape.tied_embeddings):  # a pipeline holds a tied matrix at both of its ends
                count += rows * shape.hidden_size
        stages.append(StageParameters(stage, layers, count, rows if is_last else 0))
    return stages
