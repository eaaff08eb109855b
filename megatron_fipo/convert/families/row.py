"""The rows of a family's table, and the parameters that they become for a model of known sizes.

A `Row` speaks of one kind of parameter in all layers: `{layer}` and `{expert}` in its names stand for numbers, and its
sizes are functions of the model's. A `Parameter` is one parameter of one model, with every number filled in. Shapes,
names and ranks are derived from the parameters where they are needed.

Nothing here needs torch: preflight counts with these tables, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_fipo.convert.mapping import Layout, Replicated, Size
from megatron_fipo.convert.model_shape import ModelShape

Axis = Literal["tp", "ep"]
"""The kind of parallelism that spreads a parameter over ranks.

`tp`: every rank of tensor parallelism has a shard of it, cut by its layout.
`ep`: every rank of expert parallelism has other experts, in blocks by number, each of them whole. (Megatron can cut an
expert once more, over its "expert tensor parallelism"; that would be cut by the row's layout too.)
"""


def always(shape: ModelShape) -> bool:
    """Return True: every model of the family has the row's parameters."""
    return True


@dataclass(frozen=True)
class HfTensor:
    """A tensor of a Hugging Face checkpoint.

    Attributes:
        name: the name, with `{layer}` for the global layer number from 0, and `{expert}` for the expert's.
        size: function from a model's shape to the whole tensor's size.
    """

    name: str
    size: Callable[[ModelShape], Size]


@dataclass(frozen=True)
class Row:
    """One kind of parameter of the Megatron model, in every layer and of every expert.

    Attributes:
        megatron: the parameter's name, with `{layer}` and `{expert}` as in the tensors' names.
        tensors: the Hugging Face tensors that it is made of.
        layout: how parameter and tensors correspond.
        axis: parallelism that spreads it over ranks; None where every rank has all of it.
        exists: whether a model of a shape has it.
        is_stored: whether checkpoints use this name. A norm outside the linear layer after it is stored under the name
            that Transformer Engine's fused layer gives it, so that either kind of layers loads the other's checkpoint.
    """

    megatron: str
    tensors: tuple[HfTensor, ...]
    layout: Layout
    axis: Axis | None
    exists: Callable[[ModelShape], bool] = always
    is_stored: bool = True

    def __post_init__(self) -> None:
        is_whole = isinstance(self.layout, Replicated)
        assert self.axis == "ep" or is_whole == (self.axis is None), (
            f"{self.megatron}: {self.layout} and axis {self.axis} contradict each other"
        )
        assert (self.axis == "ep") == ("{expert}" in self.megatron), (
            f"{self.megatron}: experts have a number, and only they are spread over axis ep"
        )

    def parameters(self, shape: ModelShape, layer: int | None) -> Iterator[Parameter]:
        """The row's parameters outside the layers (None) or in one layer; none if the model has no such row."""
        if self.is_of_layers != (layer is not None) or not self.exists(shape):
            return
        for expert in range(shape.num_experts) if self.axis == "ep" else (None,):
            numbers = {"layer": layer, "expert": expert}
            yield Parameter(
                megatron=self.megatron.format(**numbers),
                key=self.megatron.replace("{layer}.", "").replace("local_experts.{expert}.", ""),
                tensors={tensor.name.format(**numbers): tensor.size(shape) for tensor in self.tensors},
                layout=self.layout,
                axis=self.axis,
                is_stored=self.is_stored,
                layer=layer,
                expert=expert,
            )

    @property
    def is_of_layers(self) -> bool:
        """Whether every layer has such a parameter."""
        return "{layer}" in self.megatron


@dataclass(frozen=True)
class Parameter:
    """One parameter of the Megatron model of a shape.

    Attributes:
        megatron: its name, with the global numbers of its layer and its expert.
        key: the name under which a checkpoint stores it. The parameters of all layers, and of all experts, share one
            stored tensor, [num_layers, …] or [num_layers, num_experts, …].
        tensors: name and size of the Hugging Face tensors that it is made of, in the layout's order.
        layout: how the two correspond.
        axis: parallelism that spreads it over ranks; see `Axis`.
        is_stored: see `Row`.
        layer: number of its layer in the whole model, from 0; None outside the layers.
        expert: number of its expert in the whole layer, from 0; None for a parameter of no expert.
    """

    megatron: str
    key: str
    tensors: dict[str, Size]
    layout: Layout
    axis: Axis | None
    is_stored: bool
    layer: int | None
    expert: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """The Hugging Face tensors' names, in the layout's order."""
        return tuple(self.tensors)

    def num_shards(self, tp: int) -> int:
        """Number of shards into which the layout cuts it with `tp` tensor-parallel ranks."""
        return tp if self.axis == "tp" else 1

    def shard_size(self, shape: ModelShape, tp: int) -> Size:
        """Size of the part that a rank that holds the parameter has of it."""
        return self.layout.shard_size(list(self.tensors.values()), shape, self.num_shards(tp))

    def is_on_expert_rank(self, shape: ModelShape, ep: int, rank: int) -> bool:
        """Whether rank `rank` of `ep` expert-parallel ones holds it: experts lie in blocks, all else on every rank."""
        return self.expert is None or self.expert // (shape.num_experts // ep) == rank
