"""The computation that is certified, as each rank runs it: steps of FIPO updates by a real Actor on synthetic rollouts.

Shapes: N response tokens of an update, over all ranks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron_fipo import quiet  # noqa: F401 - before the packages that it silences
from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.optimizer import single_optimizers
from megatron_fipo.certify import controls
from megatron_fipo.certify.synthetic import draw_groups
from megatron_fipo.config import Config
from megatron_fipo.convert.stream import weight_stream
from megatron_fipo.parallel import batch as batches
from megatron_fipo.parallel import cpu, exchange
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.objective import LossOutput, log_prob_shift
from megatron_fipo.rl.packed_batch import PackedBatch

PAD_TOKEN = 0
_MAX_POSITION_BITS = 32


@dataclass(frozen=True)
class Job:
    """What a rank needs to know.

    Attributes:
        config: the user's, with a layout's settings in it.
        num_steps, num_updates: how much to compute.
        longest_response: tokens of the longest synthetic response.
        output: file that the first rank writes its record to.
        control: name of a deliberate mistake, see `controls`, of which the first update is enough; None makes none.
    """

    config: Config
    num_steps: int
    num_updates: int
    longest_response: int
    output: Path
    control: str | None = None


@dataclass
class TokenRecord:
    """The first update's response tokens, each with the same place in every layout.

    Attributes:
        places: int64 [N], sample and position of the predicting token; unique, unless a token was counted twice.
        log_prob_shift: float32 [N]: log-prob minus old log-prob, clamped.
        influence_weights: float32 [N].
        future_kl: float32 [N]; None without Future-KL.
        in_loss: bool [N].
        token_loss: float32 [N].
    """

    places: Tensor
    log_prob_shift: Tensor
    influence_weights: Tensor
    future_kl: Tensor | None
    in_loss: Tensor
    token_loss: Tensor

    @property
    def samples(self) -> Tensor:
        """int64 [N]: sample of each token."""
        return self.places >> _MAX_POSITION_BITS

    @property
    def positions(self) -> Tensor:
        """int64 [N]: position of each token in its sequence."""
        return self.places & ((1 << _MAX_POSITION_BITS) - 1)


@dataclass
class Record:
    """Result of a computation, gathered over all ranks.

    Attributes:
        tokens: values of the first update's tokens.
        loss: the first update's loss, normalised.
        gradients: the first update's gradients before clipping, by Hugging Face name.
        grad_norm: the norm of the first update's gradients before clipping, as the optimizer sees it.
        weights: weights after the last update, by Hugging Face name; empty for a deliberate mistake.
        num_microbatches: microbatches of the first update, on each rank.
    """

    tokens: TokenRecord
    loss: float
    gradients: dict[str, Tensor]
    grad_norm: float
    weights: dict[str, Tensor]
    num_microbatches: int


def run_rank(job: Job) -> None:
    """Run the computation in this process' layout and write a `Record`. Collective over all ranks."""
    # Megatron's advice on speed; nothing here is timed.
    warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS")
    cpu.install()
    ranks = parallel_groups.initialize(job.config.parallel, job.config.run.seed)
    try:
        with controls.applied(job.control):
            record = _Computation(job, ranks).run()
        if ranks.rank == 0:
            torch.save(record, job.output)
    finally:
        parallel_groups.shut_down()


class _Computation:
    """One run, and what is noted of its first update."""

    def __init__(self, job: Job, ranks: ParallelGroups) -> None:
        self.job, self.config, self.ranks = job, job.config, ranks
        self.actor = Actor(job.config, ranks)
        self.objective = Objective(job.config.objective, ranks.cp)
        self.losses: list[tuple[PackedBatch, Tensor, LossOutput]] = []
        self.gradients: dict[str, Tensor] = {}

    def run(self) -> Record:
        first, *others = self._minibatches(0)
        noted = self._first_update(first)
        if self.job.control:
            return Record(weights={}, **noted)
        for step in range(self.job.num_steps):
            for microbatches in self._minibatches(step) if step else others:
                self.actor.update(microbatches, self.objective, step)
        return Record(weights=self._whole(self.actor.models), **noted)

    def _minibatches(self, step: int) -> list[list[PackedBatch]]:
        """One step's microbatches, with the log-probs of an old policy from which this one has drifted."""
        groups = draw_groups(self.config, self.actor.shape, step, self.job.num_updates, self.job.longest_response)
        minibatches = batches.build_minibatches(groups, self.config, self.ranks, PAD_TOKEN)
        for microbatches in minibatches:
            for batch, log_probs in zip(microbatches, self.actor.log_probs(microbatches), strict=False):
                drift = batch.rollout_log_probs
                batch.old_log_probs = log_probs - drift
                # An engine that errs by a fifth of that, for objective.rollout_correction to act on.
                batch.rollout_log_probs = batch.old_log_probs - 0.2 * drift
            if self.config.objective.kl_coefficient:
                references = self.actor.log_probs(microbatches, reference=True)
                for batch, log_probs in zip(microbatches, references, strict=False):
                    batch.reference_log_probs = log_probs
        return minibatches

    def _noted_loss(self, log_probs: Tensor, entropy: Tensor, batch: PackedBatch) -> LossOutput:
        loss = self.objective(log_probs, entropy, batch)
        assert batch.old_log_probs is not None
        self.losses.append((batch, log_prob_shift(log_probs.detach(), batch.old_log_probs), loss))
        return loss

    def _first_update(self, microbatches: Sequence[PackedBatch]) -> dict[str, Any]:
        """Take it, and return all fields of a `Record` but the weights. Collective."""
        optimizer = self.actor.optimizer
        take_step = optimizer.step

        def note_gradients_and_step() -> Any:
            self.gradients = self._whole_gradients()  # here, before the optimizer clips them in place
            return take_step()

        optimizer.step = note_gradients_and_step
        result = self.actor.update(microbatches, self._noted_loss, step=0)
        optimizer.step = take_step
        parts = exchange.all_gather_objects(self._own_part() if self.ranks.reports_loss else None, self.ranks.world)
        tokens, sums = zip(*[part for part in parts if part is not None], strict=True)
        loss_sum, normalizer = torch.stack(sums).sum(0).tolist()
        return {
            "tokens": _concatenated(tokens),
            "loss": loss_sum / normalizer,
            "gradients": self.gradients,
            "grad_norm": result.grad_norm,
            "num_microbatches": len(microbatches),
        }

    def _own_part(self) -> tuple[TokenRecord, Tensor]:
        """(this rank's tokens, float64 [loss sum, normalizer])."""
        tokens = _concatenated([_token_record(*noted) for noted in self.losses])
        sums = [torch.stack([loss.loss_sum.detach().double(), loss.normalizer.double()]) for _, _, loss in self.losses]
        return tokens, torch.stack(sums).sum(0).cpu()

    def _whole_gradients(self) -> dict[str, Tensor]:
        """Collective. The distributed optimizer leaves each rank with its share of every bucket: gather those."""
        for optimizer in single_optimizers(self.actor.optimizer):
            for buffer in getattr(optimizer, "buffers", []):
                for bucket in buffer.buckets:
                    share = bucket.grad_data.chunk(self.ranks.dp_cp.size())[self.ranks.dp_cp.rank()]
                    bucket.grad_data.copy_(torch.cat(exchange.all_gather_tensors(share.clone(), self.ranks.dp_cp)))
        return self._whole([_GradientView(model) for model in self.actor.models])

    def _whole(self, chunks: Sequence[nn.Module]) -> dict[str, Tensor]:
        """Whole tensors by Hugging Face name on the first rank, nothing elsewhere. Collective."""
        stream = weight_stream(chunks, self.ranks, self.actor.shape)
        is_leader = self.ranks.rank == 0
        return {name: tensor.float().cpu().clone() for name, tensor in stream if is_leader}


class _GradientView(nn.Module):
    """A model chunk whose parameters are its gradients, so that they stream as weights do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder = model.decoder
        self._model = [model]  # in a list: as a submodule its parameters would appear under other names

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._model[0].named_parameters(*args, **kwargs):
            yield name, nn.Parameter(parameter.main_grad, requires_grad=False)  # type: ignore[attr-defined]


def _token_record(batch: PackedBatch, shift: Tensor, loss: LossOutput) -> TokenRecord:
    """The response tokens among this rank's rows of a microbatch."""
    samples = torch.tensor(batch.sample_indices, device=batch.sequence_ids.device)[batch.sequence_ids]
    mask = batch.response_mask

    def of_response(values: Tensor) -> Tensor:
        return values[mask].cpu()

    return TokenRecord(
        places=of_response((samples << _MAX_POSITION_BITS) + batch.position_ids),
        log_prob_shift=of_response(shift),
        influence_weights=of_response(loss.influence_weights),
        future_kl=None if loss.future_kl is None else of_response(loss.future_kl),
        in_loss=of_response(loss.final_mask),
        token_loss=of_response(loss.token_loss),
    )


def _concatenated(parts: Sequence[TokenRecord]) -> TokenRecord:
    """The tokens of all parts, ordered by place."""
    order = torch.cat([part.places for part in parts]).argsort(stable=True)

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)[order]

    return TokenRecord(**{name: joined(name) for name in TokenRecord.__dataclass_fields__})
