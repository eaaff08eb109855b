"""The families of models that can be trained, one module and one table for each, and what follows from a table.

A new family is a module with its table, and its line in `FAMILIES`. Names and sizes of all tensors, the conversion in
both directions, the stream of weights to rollout engines, the checks of folders and preflight's numbers of parameters
follow from the table.
"""

from __future__ import annotations

from functools import cache

from megatron_fipo.convert.families import llama, qwen2, qwen3
from megatron_fipo.convert.families.family import Family
from megatron_fipo.convert.families.row import Parameter
from megatron_fipo.convert.mapping import Size
from megatron_fipo.convert.model_shape import ModelShape

FAMILIES: dict[str, Family] = {family.name: family for family in (qwen2.FAMILY, qwen3.FAMILY, llama.FAMILY)}
"""All families, by config.json's model_type."""


@cache
def rows(shape: ModelShape) -> tuple[Parameter, ...]:
    """Every row of the family's table with its numbers filled in: first those outside the layers, then layer by layer.

    Norms that have one name in Megatron's layers and another in Transformer Engine's are here under both.
    """
    table = FAMILIES[shape.family].table
    places = (None, *range(shape.num_layers))
    return tuple(parameter for layer in places for row in table for parameter in row.parameters(shape, layer))


@cache
def _by_name(shape: ModelShape) -> dict[str, Parameter]:
    return {parameter.megatron: parameter for parameter in rows(shape)}


def find_row(shape: ModelShape, megatron_name: str) -> Parameter:
    """The row of a parameter.

    Args:
        megatron_name: the parameter's name, with the global number of its layer.

    Raises:
        KeyError: if a model of this shape has no such parameter.
    """
    found = _by_name(shape).get(megatron_name)
    if found is None:
        raise KeyError(f"the {shape.family} table has no row for the Megatron parameter {megatron_name}")
    return found


@cache
def stored_rows(shape: ModelShape) -> tuple[Parameter, ...]:
    """All that a Megatron checkpoint of this shape holds, each once: embedding, layers, final norm, output layer."""
    stored = [parameter for parameter in rows(shape) if parameter.is_stored]
    return tuple(sorted(stored, key=_depth))  # stable: a layer's rows stay in the table's order


def _depth(parameter: Parameter) -> float:
    """Depth of a parameter in the model, in layers, to sort by."""
    if parameter.layer is not None:
        return parameter.layer
    return -1 if is_before_layers(parameter) else float("inf")


def is_before_layers(parameter: Parameter) -> bool:
    """Whether a parameter outside the layers belongs to the first pipeline stage; otherwise it is the last one's."""
    return parameter.megatron.startswith("embedding.")


def expected_tensors(shape: ModelShape) -> dict[str, Size]:
    """Names and sizes of every tensor of a Hugging Face checkpoint of this shape; a tied lm_head is left out.

    The order is that in which certify and the benchmarks draw a random model's weights: module by module, as the table
    has them, the weight before the bias.
    """
    modules: dict[str, dict[str, Size]] = {}
    for parameter in rows(shape):
        for name, size in parameter.tensors.items():
            modules.setdefault(name.rpartition(".")[0], {})[name] = size
    return {name: size for tensors in modules.values() for name, size in tensors.items()}
