"""The trained Megatron model as a reinforcement-learning actor: log-probs of given tokens, and updates by a given loss.

Shapes: T_local tokens of a microbatch on this context-parallel rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_fipo.actor.backend import check_layers
from megatron_fipo.actor.data_parallel import wrap_chunks
from megatron_fipo.actor.model import build_model, packed_sequence_params, transformer_config, unwrap
from megatron_fipo.actor.offload import StorageOffload
from megatron_fipo.actor.precision import check_fp8
from megatron_fipo.config import Config, log_prob_chunk_tokens, num_decay_steps
from megatron_fipo.convert.hf_config import read_model_shape
from megatron_fipo.convert.stream import load_weights, weight_stream
from megatron_fipo.metrics.reductions import Metrics, merge
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.vocab_log_probs import vocab_log_probs
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


LossFunction = Callable[[Tensor, Tensor, PackedBatch], Loss]
"""(log_probs float32 [T_local], entropy float32 [T_local], microbatch) -> loss."""


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step.

    Attributes:
        metrics: of this rank's microbatches, merged; empty where this rank holds no end of the pipeline.
        grad_norm: over all parameters, before clipping; the same on every rank.
        learning_rate: that the step was taken with.
    """

    metrics: Metrics
    grad_norm: float
    learning_rate: float


class NonFiniteError(RuntimeError):
    """A loss or gradient is NaN or infinite; the optimizer step was not taken."""


class Actor:
    """A sharded model with its optimizer.

    Building it is collective over all ranks. `log_probs` and `update` are collective: every rank calls them with the
    same number of microbatches, of its own data-parallel share.
    """

    def __init__(self, config: Config, groups: ParallelGroups) -> None:
        """Build the model in the config's layout and load its weights.

        Raises:
            ValueError: if model.path does not hold a whole supported checkpoint, model.fp8 is not for this GPU, or
                Transformer Engine is missing where it matters.
        """
        check_fp8(config.model.fp8)
        check_layers(config)
        self.groups = groups
        self._config = config
        self.shape = read_model_shape(config.model.path)
        chunks = self._load_chunks()
        model_config = transformer_config(self.shape, config.model, config.parallel)
        self._chunks = wrap_chunks(chunks, model_config, config, groups)
        self.optimizer = self._build_optimizer()
        self._scheduler = self._build_scheduler()
        self._reference = self._load_chunks() if config.objective.kl_coefficient else None
        self._offload: StorageOffload | None = None

    @property
    def models(self) -> list[nn.Module]:
        """The bare model chunks of this rank."""
        return [unwrap(chunk) for chunk in self._chunks]

    @property
    def num_parameters(self) -> int:
        """Parameters of this rank's chunks."""
        return sum(parameter.numel() for model in self.models for parameter in model.parameters())

    def log_probs(
        self, microbatches: Sequence[PackedBatch], *, reference: bool = False, temperature: float | None = None
    ) -> list[Tensor]:
        """Log-probs of the labels under the current weights, or the frozen starting ones.

        Args:
            temperature: of the softmax; None takes rollout.temperature.

        Returns:
            float32 [T_local] for each microbatch; empty where this rank does not end the pipeline.
        """
        chunks = self._reference if reference else self._chunks
        assert chunks is not None, "no reference policy was built: objective.kl_coefficient is 0"
        with torch.no_grad():
            on_hidden = partial(self._collect_log_probs, temperature=temperature)
            return self._run(chunks, microbatches, on_hidden, forward_only=True)

    def update(self, microbatches: Sequence[PackedBatch], loss_function: LossFunction, step: int) -> UpdateResult:
        """One optimizer step on one minibatch, normalised over all its microbatches and ranks.

        Args:
            loss_function: called on each microbatch where the pipeline ends.
            step: the training step, for the learning rate and error messages.

        Raises:
            NonFiniteError: on every rank, before the optimizer step, if any rank's loss or gradient is NaN or infinite.
        """
        for chunk in self._chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        self.optimizer.zero_grad()
        faults: list[_Fault] = []
        on_hidden = partial(self._loss, loss_function=loss_function, faults=faults)
        parts = self._run(self._chunks, microbatches, on_hidden, forward_only=False)
        self._raise_on_fault(faults, step)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise NonFiniteError(
                f"step {step}, rank {self.groups.rank}: the gradient norm is {grad_norm} though every loss is finite; "
                f"not finite are the gradients of: {self._non_finite_gradients()}. No optimizer step was taken."
            )
        self._scheduler.num_steps = step + 1
        self._scheduler.step(0)
        self.optimizer.step()
        learning_rate = max(group["lr"] for group in self.optimizer.param_groups)
        return UpdateResult(merge(parts), grad_norm, learning_rate)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights under Hugging Face names, on every rank. Collective: every rank drains it."""
        return weight_stream(self.models, self.groups, self.shape)

    def offload(self) -> None:
        """Lend the GPU's memory of weights, gradients and optimizer to a rollout server; on a CPU nothing moves.

        Neither `log_probs` nor `update` nor `weights` may be called before `onload`. No communication.
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
        for chunk in (*self._chunks, *(self._reference or ())):
            model = unwrap(chunk)
            yield from (tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
        for single in getattr(self.optimizer, "chained_optimizers", [self.optimizer]):
            for group in single.optimizer.param_groups:
                yield from (parameter.detach() for parameter in group["params"])
            for state in single.optimizer.state.values():
                yield from (value for value in state.values() if isinstance(value, Tensor) and value.dim())

    def _gradient_buffers(self) -> Iterator[Tensor]:
        for chunk in self._chunks:
            buffers: Any = chunk.buffers  # Megatron's wrapper has a list where other modules have a method
            yield from (buffer.grad_data for buffer in buffers)

    def _load_chunks(self) -> list[nn.Module]:
        config = self._config
        chunks, problem = build_model(self.shape, config.model, config.parallel, self.groups), ""
        try:
            load_weights(
                [unwrap(chunk) for chunk in chunks],
                config.model.path,
                self.shape,
                tp_size=self.groups.tp.size(),
                tp_rank=self.groups.tp.rank(),
            )
        except ValueError as error:
            problem = str(error)
        # A weight that cannot be used may be one pipeline stage's alone; the others would wait for it.
        for told in exchange.all_gather_objects(problem, self.groups.world):
            if told:
                raise ValueError(told)
        return chunks

    def _build_optimizer(self) -> Any:
        section = self._config.optimizer
        bf16 = self._config.model.dtype == "bfloat16"
        config = OptimizerConfig(
            optimizer="adam",
            lr=section.learning_rate,
            min_lr=section.learning_rate if section.schedule == "constant" else section.min_learning_rate,
            weight_decay=section.weight_decay,
            adam_beta1=section.adam_beta1,
            adam_beta2=section.adam_beta2,
            adam_eps=section.adam_epsilon,
            clip_grad=section.gradient_clip,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=section.distributed,
        )
        overrides = get_standard_config_overrides(config)
        return get_megatron_optimizer(config, self._chunks, overrides, use_gloo_process_groups=False)

    def _build_scheduler(self) -> OptimizerParamScheduler:
        section = self._config.optimizer
        is_constant = section.schedule == "constant"
        return OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=section.learning_rate,
            min_lr=section.learning_rate if is_constant else section.min_learning_rate,
            lr_warmup_steps=section.num_warmup_steps,
            # Megatron's rate at the end of the decay is the least one. That is for the step after the last, so that no
            # step is made at a rate of 0; step s asks for the rate at s + 1.
            lr_decay_steps=max(num_decay_steps(self._config), section.num_warmup_steps) + 1,
            lr_decay_style=section.schedule,
            start_wd=section.weight_decay,
            end_wd=section.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )

    def _run(
        self,
        chunks: Sequence[nn.Module],
        microbatches: Sequence[PackedBatch],
        on_hidden: Callable[..., Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Megatron's schedule over the microbatches; what `on_hidden` returned for each, where the pipeline ends."""
        for chunk in chunks:
            chunk.train()  # also for log-probs: nothing is random, and only so they are sure to be the update's own
        iterators = [iter(microbatches) for _ in chunks]
        num_tokens = microbatches[0].layout.num_tokens
        return get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, on_hidden=on_hidden),
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=num_tokens,
            micro_batch_size=1,
            decoder_seq_length=num_tokens,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )

    def _forward_step(
        self, iterator: Iterator[PackedBatch], chunk: nn.Module, *, on_hidden: Callable[..., Any]
    ) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(iterator)
        keywords = {"fp32_output": False} if self._config.model.dtype == "bfloat16" else {}
        hidden = chunk(
            batch.input_ids[None],
            batch.position_ids[None],
            None,
            packed_seq_params=packed_sequence_params(batch.cu_seqlens_padded, batch.layout.cu_seqlens_padded),
            **keywords,
        )
        return hidden, partial(on_hidden, batch=batch, model=unwrap(chunk))

    def _log_probs_and_entropy(
        self, hidden: Tensor, batch: PackedBatch, model: Any, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        weight = model.output_weight()
        return vocab_log_probs(
            hidden.squeeze(1),
            weight,
            batch.labels,
            vocab_size=self.shape.vocab_size,
            temperature=self._config.rollout.temperature if temperature is None else temperature,
            chunk_tokens=log_prob_chunk_tokens(self._config.model.log_prob_chunk_mib, len(weight)),
            tp_group=self.groups.tp,
            sequence_parallel=self._config.parallel.sequence_parallel,
        )

    def _collect_log_probs(
        self, hidden: Tensor, batch: PackedBatch, model: Any, non_loss_data: bool, temperature: float | None
    ) -> Tensor:
        assert non_loss_data
        return self._log_probs_and_entropy(hidden, batch, model, temperature)[0]

    def _loss(
        self, hidden: Tensor, batch: PackedBatch, model: Any, *, loss_function: LossFunction, faults: list[_Fault]
    ) -> tuple[Tensor, Tensor, Metrics]:
        log_probs, entropy = self._log_probs_and_entropy(hidden, batch, model)
        loss = loss_function(log_probs, entropy, batch)
        faults.append(_Fault(loss.loss_sum.detach(), log_probs.detach(), batch))
        return loss.loss_sum, loss.normalizer.to(torch.int32), loss.metrics

    def _raise_on_fault(self, faults: list[_Fault], step: int) -> None:
        """Raise on every rank if any rank's loss is not finite, with that rank's account of it."""
        found = [fault.describe() for fault in faults if not torch.isfinite(fault.loss_sum)]
        if not exchange.any_rank(bool(found), self.groups.world):
            return
        accounts = exchange.all_gather_objects(found, self.groups.world)
        rank = next(rank for rank, account in enumerate(accounts) if account)
        raise NonFiniteError(f"step {step}, rank {rank}: {accounts[rank][0]} No optimizer step was taken.")

    def _non_finite_gradients(self) -> str:
        names = [
            name
            for model in self.models
            for name, parameter in model.named_parameters()
            if not torch.isfinite(parameter.main_grad).all()  # type: ignore[attr-defined]
        ]
        return ", ".join(names[:5]) or "none on this rank"


@dataclass(frozen=True)
class _Fault:
    """What a microbatch's loss was computed from, kept until it is known to be finite."""

    loss_sum: Tensor
    log_probs: Tensor
    batch: PackedBatch

    def describe(self) -> str:
        """Which samples the loss became NaN or infinite in."""
        inputs = {
            "log-probs": self.log_probs,
            "old log-probs": self.batch.old_log_probs,
            "reference log-probs": self.batch.reference_log_probs,
            "advantages": self.batch.advantages,
        }
        what, samples = "finite inputs of", self.batch.sample_indices
        for name, values in inputs.items():
            if values is None:
                continue
            bad = self.batch.sequence_ids[~torch.isfinite(values) & self.batch.response_mask].unique().tolist()
            if bad:
                what, samples = name + " of", [self.batch.sample_indices[index] for index in bad]
                break
        return f"the loss is {float(self.loss_sum)}; {what} samples {samples[:8]} of the step's batch."
