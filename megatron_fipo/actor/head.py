"""The head of a model: it computes the model's outputs from the hidden states of the last pipeline stage.

A policy's head gives log-probs of the tokens that follow. A head that gives something else, such as a value for each
token, is a module of its own that keeps this protocol, and may bring parameters: they lie in the model's last chunk
under the name `head`, where the optimizer and the checkpoints find them. They are not part of the weights that rollout
engines and exports get, because a Hugging Face model has no place for them.

Shapes: T_local tokens of a microbatch on this context-parallel rank, H hidden size.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_fipo.actor.hidden_states import HiddenStateModel
from megatron_fipo.rl.packed_batch import PackedBatch

Outputs = TypeVar("Outputs", bound=NamedTuple, covariant=True)
"""A NamedTuple of tensors, float32 [T_local] each, the same on every tensor-parallel rank."""


class Head(Protocol[Outputs]):
    """The head that a trained model is built with."""

    @property
    def uses_output_layer(self) -> bool:
        """Whether the head reads the language model's output layer.

        A head that does not must return False, so that the layer is left out: a parameter without a gradient would
        decay, and a sum of gradients that overlaps with backward would wait for it.
        """
        ...

    def own_module(self, config: TransformerConfig) -> nn.Module | None:
        """The head's parameters, in the model's dtype and with the same values on every rank; None if it has none.

        It is called on the last pipeline stage, and its result becomes `model.head`. Under sequence parallelism each
        tensor-parallel rank has hidden states of its own rows: a parameter that is applied to them before they are
        gathered needs the attribute sequence_parallel=True, by which Megatron sums its gradient over the ranks.
        """
        ...

    def __call__(self, hidden: Tensor, batch: PackedBatch, model: HiddenStateModel) -> Outputs:
        """Compute the outputs of a microbatch. Collective over the tensor-parallel group; differentiable.

        Args:
            hidden: [T_local, 1, H] after the final norm; T_local / tp rows of it under sequence parallelism.
            batch: this rank's rows of the microbatch.
            model: the chunk that gave the hidden states.
        """
        ...
