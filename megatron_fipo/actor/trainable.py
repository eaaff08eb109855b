"""Decides which parameters of a model are trained, and which weights everybody else gets of it.

Training all weights is one answer. Another, such as adapters beside frozen weights, is a module of its own that keeps
this protocol: what it adds to the model is trained and saved with it, and what it streams are whole weights under
Megatron's names, so that rollout engines and exports see an ordinary model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from megatron_fipo.actor.hidden_states import HiddenStateModel


class Trainable(Protocol):
    """The choice of trained parameters that a trained model is built with."""

    def prepare(self, model: HiddenStateModel) -> None:
        """Mark by requires_grad what is trained, and add further parameters to train, in the model's dtype.

        It is called on each chunk with its weights loaded and on its device, before gradients and the optimizer's state
        get their memory: what requires no gradient then has neither.
        """
        ...

    def weights(self, model: HiddenStateModel) -> Iterator[tuple[str, Tensor]]:
        """(Megatron's name, this rank's shard) of each weight that the chunk was loaded with, as it is now."""
        ...


class AllWeights:
    """Every parameter is trained, the head's included; a `Trainable`."""

    def prepare(self, model: HiddenStateModel) -> None:
        """Freeze nothing, and add nothing."""
        model.requires_grad_(True)

    def weights(self, model: HiddenStateModel) -> Iterator[tuple[str, Tensor]]:
        """All parameters, with their names."""
        yield from model.named_parameters()


ALL_WEIGHTS = AllWeights()
