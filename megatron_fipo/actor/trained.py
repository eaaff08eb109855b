"""A Megatron model that is trained: built and loaded in a layout, updated by a loss, lent out, saved and streamed.

Its head computes the outputs from its hidden states (see `head`). With a `PolicyHead` it is the actor; nothing here
knows of policies.

Shapes: T_local tokens of a microbatch on this context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

import torch
from torch import Tensor, nn

from megatron_fipo.actor.backend import check_layers
from megatron_fipo.actor.data_parallel import wrap_chunks
from megatron_fipo.actor.head import Head, Outputs
from megatron_fipo.actor.hidden_states import HiddenStateModel, unwrap
from megatron_fipo.actor.model import build_model
from megatron_fipo.actor.non_finite import ComputedLoss, check_gradients, check_losses
from megatron_fipo.actor.offload import StorageOffload
from megatron_fipo.actor.optimizer import LearningRate, build_optimizer, single_optimizers
from megatron_fipo.actor.precision import check_fp8
from megatron_fipo.actor.schedule import run_schedule
from megatron_fipo.actor.sharded_state import State, restore_state, sharded_state
from megatron_fipo.actor.trainable import ALL_WEIGHTS, Trainable
from megatron_fipo.config import Config
from megatron_fipo.convert.hf_config import ModelShape
from megatron_fipo.convert.stream import load_weights, weight_stream
from megatron_fipo.metrics.reductions import Metrics, merge
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.rl.packed_batch import PackedBatch


class Loss(Protocol):
    """What an update needs to know of a microbatch's loss."""

    @property
    def loss_sum(self) -> Tensor:
        """0-d, differentiable; this rank's part of the sum."""
        ...

    @property
    def normalizer(self) -> Tensor:
        """0-d integer; this rank's part of what the sum over all ranks and microbatches is divided by."""
        ...

    @property
    def metrics(self) -> Metrics:
        """Mergeable metrics of this rank's part."""
        ...


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step.

    Attributes:
        metrics: metrics of this rank's microbatches, merged; empty except on the last pipeline stage.
        grad_norm: norm over all parameters, before clipping; the same on every rank.
        learning_rate: learning rate of the step.
    """

    metrics: Metrics
    grad_norm: float
    learning_rate: float


class TrainedModel(Generic[Outputs]):
    """A sharded model with its head and its optimizer.

    Building it is collective over all ranks. `forward` and `update` are collective: every rank calls them with the same
    number of microbatches, of its own data-parallel share.
    """

    def __init__(
        self,
        config: Config,
        ranks: ParallelGroups,
        shape: ModelShape,
        head: Head[Outputs],
        trainable: Trainable = ALL_WEIGHTS,
    ) -> None:
        """Build the model in the config's layout and load its weights.

        Args:
            shape: shape of the model at model.path.
            head: the model's head.
            trainable: which of its parameters are trained.

        Raises:
            ValueError: if model.path does not hold a whole supported checkpoint, model.fp8 is not for this GPU, or
                Transformer Engine is missing where it matters.
        """
        check_fp8(config.model.fp8)
        check_layers(config)
        self.ranks, self.shape, self.head = ranks, shape, head
        self._trainable = trainable
        chunks = load_chunks(config, shape, ranks, head)
        for chunk in chunks:
            trainable.prepare(unwrap(chunk))
        self._chunks = wrap_chunks(chunks, config, ranks)
        self.optimizer = build_optimizer(config, self._chunks)
        self._learning_rate = LearningRate(config, self.optimizer)
        self._offload: StorageOffload | None = None

    @property
    def models(self) -> list[HiddenStateModel]:
        """The bare model chunks of this rank."""
        return [unwrap(chunk) for chunk in self._chunks]

    @property
    def num_parameters(self) -> int:
        """Parameters of this rank's chunks."""
        return sum(parameter.numel() for model in self.models for parameter in model.parameters())

    def forward(self, microbatches: Sequence[PackedBatch], head: Head[Outputs] | None = None) -> list[Outputs]:
        """Compute a head's outputs for each microbatch under the current weights, without gradients.

        Args:
            head: one that needs no other parameters than the model's own head; None takes that one.

        Returns:
            The outputs for each microbatch; empty except on the last pipeline stage.
        """
        with torch.no_grad():
            return run_schedule(self._chunks, microbatches, self.head if head is None else head, forward_only=True)

    def update(
        self, microbatches: Sequence[PackedBatch], loss_function: Callable[..., Loss], step: int
    ) -> UpdateResult:
        """One optimizer step on one minibatch, normalised over all its microbatches and ranks.

        Args:
            loss_function: called with the head's outputs, one by one, and the microbatch, on the last stage.
            step: the training step, for the learning rate and error messages.

        Raises:
            NonFiniteError: on every rank, before the optimizer step, if any rank's loss or gradient is NaN or infinite.
        """
        for chunk in self._chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        metrics, losses = self._forward_and_backward(microbatches, loss_function)
        check_losses(losses, step, self.ranks)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        check_gradients(grad_norm, self.models, step, self.ranks.rank)
        self._learning_rate.set_for(step)
        self.optimizer.step()
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        return UpdateResult(merge([*metrics]), grad_norm, learning_rate)

    def _forward_and_backward(
        self, microbatches: Sequence[PackedBatch], loss_function: Callable[..., Loss]
    ) -> tuple[list[Metrics], list[ComputedLoss]]:
        """Add up gradients; return (metrics, losses) by microbatch, both empty except on the last pipeline stage."""
        losses: list[ComputedLoss] = []

        def loss_of(hidden: Tensor, batch: PackedBatch, model: HiddenStateModel) -> tuple[Tensor, Tensor, Metrics]:
            outputs = self.head(hidden, batch, model)
            loss = loss_function(*outputs, batch)
            values = {name: value.detach() for name, value in outputs._asdict().items()}
            losses.append(ComputedLoss(loss.loss_sum.detach(), values, batch))
            return loss.loss_sum, loss.normalizer.to(torch.int32), loss.metrics

        return run_schedule(self._chunks, microbatches, loss_of, forward_only=False), losses

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under Hugging Face names, on every rank; without a head's own parameters.

        Collective: every rank drains it.
        """
        return weight_stream(self.models, self.ranks, self.shape, self._trainable.weights)

    def sharded_state(self) -> State:
        """This rank's shards of all parameters and of the optimizer's state, for a checkpoint. Collective."""
        return sharded_state(self.models, self.optimizer, self.ranks)

    def restore(self, read: Callable[[State], State]) -> State:
        """Load parameters and optimizer state that were saved in whatever layout. Collective over all ranks.

        Learning rate and Adam's constants stay those of this model's configuration.

        Args:
            read: fills a sharded state from a checkpoint, and returns it with everything else that was saved.

        Returns:
            What `read` returned.
        """
        return restore_state(self.models, self.optimizer, self.ranks, read)

    def offload(self) -> None:
        """Lend the GPU's memory of weights, gradients and optimizer to a rollout server; on a CPU nothing moves.

        No other method may be called before `onload`. No communication.
        """
        if torch.cuda.is_available():
            now = StorageOffload(self._lasting_tensors(), self._gradient_buffers())
            if self._offload is None or not self._offload.is_of_same_storages(now):  # Adam's state came into being
                self._offload = now
            self._offload.offload()

    def onload(self) -> None:
        """Take back what `offload` lent. No communication."""
        if self._offload is not None and self._offload.is_offloaded:
            self._offload.onload()

    def _lasting_tensors(self) -> Iterator[Tensor]:
        """Every tensor whose contents must last from one update to the next."""
        yield from tensors_of(self._chunks)
        for single in single_optimizers(self.optimizer):
            for group in single.optimizer.param_groups:
                yield from (parameter.detach() for parameter in group["params"])
            for state in single.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())

    def _gradient_buffers(self) -> Iterator[Tensor]:
        """The memory that gradients are summed in, which holds nothing between updates."""
        for chunk in self._chunks:
            buffers: Any = chunk.buffers  # Megatron's wrapper has a list where other modules have a method
            yield from (buffer.grad_data for buffer in buffers)


def load_chunks(config: Config, shape: ModelShape, ranks: ParallelGroups, head: Head[Any]) -> list[nn.Module]:
    """This rank's model chunks with the weights of model.path. Collective over all ranks.

    Raises:
        ValueError: on every rank, if the folder does not hold what this or another rank needs of it.
    """
    chunks, problem = build_model(shape, config.model, config.parallel, ranks, head), ""
    try:
        load_weights(
            [unwrap(chunk) for chunk in chunks],
            config.model.path,
            shape,
            tp_size=ranks.tp.size(),
            tp_rank=ranks.tp.rank(),
        )
    except ValueError as error:
        problem = str(error)
    # A weight that cannot be used may be one pipeline stage's alone; the others would wait for it.
    for told in exchange.all_gather_objects(problem, ranks.world):
        if told:
            raise ValueError(told)
    return chunks


def tensors_of(chunks: Sequence[nn.Module]) -> Iterator[Tensor]:
    """All parameters and buffers of model chunks."""
    for model in (unwrap(chunk) for chunk in chunks):
        yield from (tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
