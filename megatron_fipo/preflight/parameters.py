"""Numbers of parameters, exactly: of a whole model, and of one rank of a layout.

All of them are sums over the rows of the model's family (`convert.families`), so that biases, norms and the padding of
the vocabulary are counted, and that of a rank is what the trainer gives it.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from megatron_fipo.config import ParallelSection
from megatron_fipo.convert.families import expected_tensors, find_row, is_before_layers, stored_rows
from megatron_fipo.convert.families.row import Parameter
from megatron_fipo.convert.model_shape import ModelShape

_EMBEDDING = "embedding.word_embeddings.weight"


def whole_parameters(shape: ModelShape) -> int:
    """Parameters of the Hugging Face checkpoint: no padding, a tied output layer counted once."""
    return sum(prod(size) for size in expected_tensors(shape).values())


def matmul_parameters(shape: ModelShape) -> int:
    """Parameters that a token is multiplied with: every matrix but the embedding, the output layer included."""
    output_layer = _matrix_parameters(find_row(shape, _EMBEDDING))  # as large as the embedding, or the embedding itself
    return shape.num_layers * sum(layer_matrices(shape)) + output_layer


def layer_matrices(shape: ModelShape) -> tuple[int, int]:
    """(the attention's, the MLP's) parameters in matrices of one layer."""
    first_layer = [row for row in stored_rows(shape) if row.layer == 0]
    attention, mlp = (
        sum(_matrix_parameters(row) for row in first_layer if f".{module}." in row.megatron)
        for module in ("self_attention", "mlp")
    )
    return attention, mlp


def _matrix_parameters(row: Parameter) -> int:
    return sum(prod(size) for size in row.tensors.values() if len(size) == 2)


@dataclass(frozen=True)
class StageParameters:
    """What each rank of one pipeline stage holds.

    Attributes:
        stage: the stage's number, from 0.
        num_layers: layers of the stage, all its virtual stages together.
        parameters: number of parameters on one tensor-parallel rank, vocabulary padding included.
        output_rows: rows of the output layer on one tensor-parallel rank; 0 where the pipeline does not end.
    """

    stage: int
    num_layers: int
    parameters: int
    output_rows: int


def stage_parameters(shape: ModelShape, parallel: ParallelSection, ep: int = 1) -> list[StageParameters]:
    """What every pipeline stage holds, in order. The layout must divide the model (`validate_model_layout`).

    Args:
        ep: over how many ranks the experts of a layer are spread.
    """
    held = [0] * parallel.pp
    for row in stored_rows(shape):
        if row.is_on_expert_rank(shape, ep, rank=0):  # every rank has as many experts
            held[_stage_of(row, shape, parallel.pp)] += prod(row.shard_size(shape, parallel.tp))
    rows, hidden = find_row(shape, _EMBEDDING).shard_size(shape, parallel.tp)
    if shape.tied_embeddings and parallel.pp > 1:
        held[-1] += rows * hidden  # a pipeline holds a tied matrix at both of its ends
    return [
        StageParameters(stage, shape.num_layers // parallel.pp, count, rows if stage == parallel.pp - 1 else 0)
        for stage, count in enumerate(held)
    ]


def _stage_of(row: Parameter, shape: ModelShape, num_stages: int) -> int:
    """The pipeline stage that holds a row.

    With virtual stages other layers are together than those that this says. Their number is the same, and so is what
    each of them holds.
    """
    if row.layer is None:
        return 0 if is_before_layers(row) else num_stages - 1
    return row.layer // (shape.num_layers // num_stages)
