"""The same training on the same samples: by the actor in any layout, and by transformers in one process.

A `Case` names a model, a layout and what else must not matter (packing, recompute, optimizer sharding). `train_actor`
runs it on real ranks, `train_reference` knows nothing of Megatron, packing or sharding, and `deviations` compares the
two against the bounds that the project states. All three go through several steps of several updates with the real
FIPO loss, so what is compared includes Future-KL, the sequence filter, clipping, normalisation and AdamW.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import (
    BatchSection,
    Config,
    FipoConfig,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    RolloutSection,
    TrainSection,
    microbatch_token_multiple,
)
from megatron_fipo.convert.stream import weight_stream
from megatron_fipo.metrics.reductions import Distribution, Histogram, Metrics, merge
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.trajectory import Group, Prompt, Trajectory
from tests.losses import packed_loss
from tests.models import load, save_random_model

Part = TypeVar("Part")

TEMPERATURE = 0.7
PAD_TOKEN = 0
NUM_MINIBATCHES = 2
ADAM_EPSILON = 1e-5
"""Gradients here are about 1e-3 and their rounding 1e-8. Adam's first step is the gradient's sign, so at the usual 1e-8
an element whose gradient happens to be as small as its rounding (of 45,000 some are) would move a whole learning rate
this way or that. At 1e-5 its move is in proportion to its gradient, while for all others nothing changes."""

GRADIENT_BOUND = 1e-5
"""Relative, of the first update's gradients and of the gradient norm."""
LOSS_BOUND = 1e-5
"""Of the loss, over the mean absolute token loss."""
INFLUENCE_BOUND = 2e-5
"""Of each token's influence weight."""
WEIGHT_BOUND = 1e-4
"""||difference|| / ||distance from the start||, over all weights, after all updates."""

LOG_PROB_CHUNK_MIB = 3 / 128
"""48 tokens over 128 rows, as many as a rank has of these models under any layout."""

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    # Grouped-query attention, biases on q, k and v, output layer tied to the embedding.
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    # Multi-head attention, no bias, output layer of its own.
    "llama": ("llama", {"num_key_value_heads": 4}),
}


@dataclass(frozen=True)
class Case:
    """One way of running the same training."""

    name: str
    model: str = "qwen2"
    parallel: ParallelSection = field(default_factory=ParallelSection)
    distributed: bool = True
    recompute: str = "none"
    max_tokens: int = 200
    aggregation: str = "token_mean"
    num_steps: int = 2
    padded_for: str = "none"
    """Microbatches are as long as this FP8 recipe wants them. FP8 itself needs a GPU."""


def save_models(folder: Path, num_layers: int = 4) -> dict[str, str]:
    """Write the models and return their folders by name. Four layers do for every layout of four ranks."""
    return {
        name: str(save_random_model(folder / name, family, num_hidden_layers=num_layers, **changes))
        for name, (family, changes) in MODELS.items()
    }


def config_of(case: Case, folder: str) -> Config:
    """The configuration of a case."""
    return Config(
        model=ModelSection(path=folder, recompute=case.recompute, log_prob_chunk_mib=LOG_PROB_CHUNK_MIB),
        rollout=RolloutSection(temperature=TEMPERATURE),
        objective=FipoConfig(
            half_life_tokens=8.0,
            influence_min=0.8,
            influence_max=1.2,
            safety_ratio=3.0,
            loss_aggregation=case.aggregation,
            sequence_sum_tokens=60 if case.aggregation == "sequence_sum" else None,
        ),
        train=TrainSection(num_minibatches=NUM_MINIBATCHES),
        optimizer=OptimizerSection(
            learning_rate=1e-3, num_warmup_steps=0, adam_epsilon=ADAM_EPSILON, distributed=case.distributed
        ),
        parallel=case.parallel,
        batch=BatchSection(max_tokens_per_microbatch=case.max_tokens),
    )


@cache
def groups_of_step(step: int) -> tuple[Group, ...]:
    """Four groups of four responses, of 1 … 60 tokens behind prompts of 1 … 9.

    `rollout_log_probs` hold what old log-probs are moved by, so that the very first update has ratios other than 1:
    mostly small, some beyond safety_ratio, a few beyond dual_clip (one response has too many of them and is filtered).
    """
    generator = torch.Generator().manual_seed(100 + step)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    groups = []
    for prompt_id in range(4):
        samples = []
        for index in range(4):
            num_response = 1 if (prompt_id, index) == (0, 0) else integer(2, 60)
            drift = torch.randn(num_response, generator=generator) * 0.3
            advantage = (1.5, -0.5, -1.25, 0.75)[index]
            if prompt_id % 2 and num_response > 8:
                drift[3] = 1.4  # ratio 4.06
                drift[5] = 2.5  # ratio 12.2
                if index == 2:
                    drift[6:8] = 2.5
            samples.append(
                Trajectory.of_response(
                    prompt_id=prompt_id,
                    sample_index=index,
                    prompt_ids=torch.randint(2, 20, (1 if index == 0 else integer(1, 9),), generator=generator),
                    response_ids=torch.randint(2, 20, (num_response,), generator=generator),
                    rollout_log_probs=drift,
                    finish_reason="stop",
                    advantage=advantage,
                )
            )
        groups.append(Group(Prompt(prompt_id, "made", "", (), "exact", None), samples))
    return tuple(groups)


@dataclass
class Outcome:
    """What a training did. Everything is whole: summed or gathered over ranks."""

    losses: list[float] = field(default_factory=list)
    """Of each update, normalised."""
    loss_scales: list[float] = field(default_factory=list)
    """Mean |token loss| of each update, normalised the same way."""
    grad_norms: list[float] = field(default_factory=list)
    """Of each update, before clipping."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of the first update by Hugging Face name; empty where the optimizer shards them."""
    influence: dict[tuple[int, int], float] = field(default_factory=dict)
    """Of the first update: (sample, position of the predicting token) -> weight, tokens in the loss only."""
    metrics: Metrics = field(default_factory=dict)
    """Of the first update."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After the last update."""


# --- one process, transformers ---------------------------------------------------------------------------------------


def train_reference(folder: str, case: Case) -> Outcome:
    """The training without any of what the actor does: one sequence at a time, transformers, torch's AdamW."""
    config, outcome = config_of(case, folder), Outcome()
    model = load(Path(folder))
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.optimizer.weight_decay},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=config.optimizer.learning_rate,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_epsilon,
    )
    for step in range(case.num_steps):
        groups = groups_of_step(step)
        per_minibatch = len(groups) // NUM_MINIBATCHES
        samples = [sample for group in groups for sample in group.samples]
        old: list[Tensor] = []
        for first in range(0, len(groups), per_minibatch):
            members = range(first * 4, (first + per_minibatch) * 4)
            parts = [_plain_log_probs(model, samples[i]) for i in members]
            if first == 0:  # its own log-probs are the old ones; the others' must be taken before the update
                with torch.no_grad():
                    rest = [_plain_log_probs(model, sample) for sample in samples[len(parts) :]]
                now = [log_probs.detach() for log_probs, _ in [*parts, *rest]]
                old = [log_probs - _shifts(sample) for log_probs, sample in zip(now, samples, strict=True)]
            loss = _plain_loss([(samples[i], old[i]) for i in members], parts, config.objective)
            optimizer.zero_grad()
            (loss.loss_sum / loss.normalizer).backward()
            _note_update(outcome, [_sums(loss)])
            if not outcome.gradients:
                outcome.gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
                outcome.metrics = loss.metrics
                places = [(i, t) for i in members for t in range(samples[i].num_tokens - 1)]
                outcome.influence = _influence(places, loss)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.gradient_clip)
            outcome.grad_norms.append(float(norm))
            optimizer.step()
    outcome.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return outcome


def _shifts(sample: Trajectory) -> Tensor:
    """What a sample's old log-probs are moved by, row by row: float32 [P + R - 1]."""
    return F.pad(sample.rollout_log_probs, (len(sample.prompt_ids) - 1, 0))


def _plain_log_probs(model: Any, sample: Trajectory) -> tuple[Tensor, Tensor]:
    """(log-probs, entropy), each [P + R - 1]."""
    tokens = torch.cat([sample.prompt_ids, sample.response_ids])
    log_p = F.log_softmax(model(tokens[None]).logits[0, :-1] / TEMPERATURE, dim=-1)
    return log_p.gather(-1, tokens[1:, None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def _plain_loss(
    members: Sequence[tuple[Trajectory, Tensor]], parts: Sequence[tuple[Tensor, Tensor]], objective: FipoConfig
) -> LossOutput:
    lengths = [len(old) for _, old in members]
    masks = [torch.arange(len(old)) >= len(sample.prompt_ids) - 1 for sample, old in members]
    advantages = [torch.full((len(old),), sample.advantage) for sample, old in members]
    return packed_loss(
        torch.tensor([0, *itertools.accumulate(lengths)]),
        objective,
        log_probs=torch.cat([log_probs for log_probs, _ in parts]),
        old_log_probs=torch.cat([old for _, old in members]),
        advantages=torch.cat(advantages),
        response_mask=torch.cat(masks),
        entropy=torch.cat([entropy for _, entropy in parts]),
        rollout_log_probs=torch.cat([_shifts(sample) for sample, _ in members]),
    )


def _influence(places: Sequence[tuple[int, int]], loss: LossOutput) -> dict[tuple[int, int], float]:
    rows = zip(places, loss.influence_weights.tolist(), loss.final_mask.tolist(), strict=True)
    return {place: weight for place, weight, is_counted in rows if is_counted}


Sums = tuple[int, float, int, float]
"""Of a part of an update: the normaliser, the loss before it, the tokens in the loss, the sum of their |token loss|."""


def _sums(loss: LossOutput) -> Sums:
    absolute = (loss.token_loss.abs() * loss.final_mask).sum()
    return int(loss.normalizer), float(loss.loss_sum.detach()), int(loss.final_mask.sum()), float(absolute)


def _note_update(outcome: Outcome, parts: Sequence[Sums]) -> None:
    """Add the loss of an update, given the sums of all its parts."""
    normalizer, loss_sum, num_tokens, absolute = (sum(column) for column in zip(*parts, strict=True))
    outcome.losses.append(loss_sum / normalizer)
    outcome.loss_scales.append(absolute / num_tokens)


# --- the actor, in a layout ------------------------------------------------------------------------------------------

LossOfBatch = Callable[[Tensor, Tensor, PackedBatch], Any]


@dataclass
class Breakage:
    """Something done wrong on purpose, to see that the comparison notices.

    Attributes:
        during: entered around everything: patches of the project's functions.
        actor: changes the actor once it is built.
        batches: changes each microbatch once it is sharded.
        loss: changes the loss function.
    """

    during: Callable[[], AbstractContextManager[Any]] = nullcontext
    actor: Callable[[Actor], None] = lambda actor: None
    batches: Callable[[PackedBatch], PackedBatch] = lambda batch: batch
    loss: Callable[[LossOfBatch, ParallelGroups], LossOfBatch] = lambda loss, ranks: loss


@contextmanager
def layout(parallel: ParallelSection, seed: int = 0) -> Iterator[ParallelGroups]:
    """The process groups of a layout, forgotten at the end so that the next one can be built. Collective."""
    ranks = parallel_groups.initialize(parallel, seed)
    try:
        yield ranks
    finally:
        parallel_groups.destroy_model_parallel()


def train_actor(case: Case, folder: str, ranks: ParallelGroups, breakage: Breakage | None = None) -> Outcome:
    """The training by the actor. Collective; every rank gets the whole outcome."""
    breakage = breakage or Breakage()
    with breakage.during():
        config = config_of(case, folder)
        actor = Actor(config, ranks)
        breakage.actor(actor)
        outcome = Outcome()
        config = replace(config, model=replace(config.model, fp8=case.padded_for))
        for step in range(case.num_steps):
            train_step(actor, config, step, outcome, breakage)
        outcome.weights = whole_weights(actor)
    return outcome


def train_step(actor: Actor, config: Config, step: int, outcome: Outcome, breakage: Breakage | None = None) -> None:
    """The updates of one step, noted in `outcome`. Collective."""
    breakage, ranks = breakage or Breakage(), actor.ranks
    minibatches = [
        [breakage.batches(batch) for batch in microbatches]
        for microbatches in build_minibatches(groups_of_step(step), config, ranks, PAD_TOKEN)
    ]
    lengths = [batch.layout.num_tokens for microbatches in minibatches for batch in microbatches]
    assert not any(length % microbatch_token_multiple(config) for length in lengths)
    for microbatches in minibatches:
        for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=ranks.is_last_stage):
            batch.old_log_probs = log_probs - batch.rollout_log_probs
    for microbatches in minibatches:
        recorded: list[tuple[PackedBatch, LossOutput]] = []
        loss_of = breakage.loss(_trainers_loss(config, ranks, recorded), ranks)
        is_first = not outcome.grad_norms
        has_whole_gradients = not config.optimizer.distributed and config.model.dtype == "float32"
        with _capturing_gradients(actor, outcome) if is_first and has_whole_gradients else nullcontext():
            result = actor.update(microbatches, loss_of, step)
        outcome.grad_norms.append(result.grad_norm)
        own = recorded if ranks.reports_loss else []
        _note_update(outcome, _of_all_ranks([_sums(loss) for _, loss in own], ranks))
        if is_first:
            outcome.metrics = merge(_of_all_ranks([loss.metrics for _, loss in own], ranks))
            for influence in _of_all_ranks([_influence(_places(batch), loss) for batch, loss in own], ranks):
                assert not outcome.influence.keys() & influence.keys(), "a token was counted twice"
                outcome.influence |= influence


def whole_weights(actor: Actor) -> dict[str, Tensor]:
    """Copies of all weights under Hugging Face names. Collective."""
    return {name: tensor.clone() for name, tensor in actor.weights()}


def _trainers_loss(
    config: Config, ranks: ParallelGroups, recorded: list[tuple[PackedBatch, LossOutput]]
) -> LossOfBatch:
    """The trainer's loss, noting what it returned."""

    def loss_of(log_probs: Tensor, entropy: Tensor, batch: PackedBatch) -> LossOutput:
        loss = Objective(config.objective, ranks.cp)(log_probs, entropy, batch)
        recorded.append((batch, loss))
        return loss

    return loss_of


def _of_all_ranks(own: list[Part], ranks: ParallelGroups) -> list[Part]:
    return [part for parts in exchange.all_gather_objects(own, ranks.world) for part in parts]


def _places(batch: PackedBatch) -> list[tuple[int, int]]:
    """(sample, position) of each of this rank's rows: every rank holds the same share of every sequence."""
    samples = [batch.sample_indices[sequence] for sequence in batch.sequence_ids.tolist()]
    return list(zip(samples, batch.position_ids.tolist(), strict=True))


@contextmanager
def _capturing_gradients(actor: Actor, outcome: Outcome) -> Iterator[None]:
    """Note the whole gradients at the moment when the actor takes their norm.

    For float32 models only: a parameter whose data are exchanged for others of another dtype loses its hooks.
    """
    take_norm = actor.optimizer.get_grad_norm

    def noting() -> Any:
        norm = take_norm()
        parameters = [p for model in actor.models for p in model.parameters()]
        held = [p.data for p in parameters]
        for p in parameters:
            p.data = p.main_grad  # type: ignore[attr-defined]
        stream = weight_stream(actor.models, actor.ranks, actor.shape)
        outcome.gradients = {name: gradient.clone() for name, gradient in stream}
        for p, data in zip(parameters, held, strict=True):
            p.data = data
        return norm

    actor.optimizer.get_grad_norm = noting
    yield
    actor.optimizer.get_grad_norm = take_norm


# --- the comparison --------------------------------------------------------------------------------------------------


def deviations(outcome: Outcome, reference: Outcome, start: dict[str, Tensor]) -> dict[str, float]:
    """How far an outcome lies from the reference, each as a multiple of its bound: at most 1 is within."""
    return {
        "gradient_norm": _relative(outcome.grad_norms[0], reference.grad_norms[0]) / GRADIENT_BOUND,
        "gradients": _distance(outcome.gradients, reference.gradients) / GRADIENT_BOUND if outcome.gradients else 0.0,
        "loss": abs(outcome.losses[0] - reference.losses[0]) / reference.loss_scales[0] / LOSS_BOUND,
        "influence": _influence_distance(outcome, reference) / INFLUENCE_BOUND,
        "weights": _moved_distance(outcome.weights, reference.weights, start) / WEIGHT_BOUND,
    }


def beyond(found: dict[str, float]) -> dict[str, float]:
    """Those deviations that are out of bounds (or not a number)."""
    return {name: value for name, value in found.items() if not value <= 1}


def metric_differences(outcome: Outcome, reference: Outcome) -> dict[str, tuple[float, float]]:
    """Metrics of the first update that differ by more than rounding, or are missing; bins may shift by a count."""
    different = {}
    for name in outcome.metrics.keys() | reference.metrics.keys():
        ours, theirs = outcome.metrics.get(name), reference.metrics.get(name)
        if ours is None or theirs is None:
            different[name] = (math.nan if ours is None else 0.0, math.nan if theirs is None else 0.0)
        elif isinstance(theirs, Histogram):
            assert isinstance(ours, Histogram)
            if int((ours.counts - theirs.counts).abs().sum()) > 2:
                different[name] = (float(ours.counts.sum()), float(theirs.counts.sum()))
        elif not isinstance(theirs, Distribution):
            assert not isinstance(ours, Histogram | Distribution)
            a, b = ours.value(), theirs.value()
            if not (math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))):
                different[name] = (a, b)
    return different


def _relative(value: float, reference: float) -> float:
    return abs(value - reference) / abs(reference)


def _distance(tensors: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Largest over parameters of ||difference|| / ||reference||, a parameter's own share of the norm at least 1e-3."""
    assert tensors.keys() == reference.keys(), tensors.keys() ^ reference.keys()
    total = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in reference.values()))
    return max(
        float((tensors[name].double() - tensor.double()).norm()) / max(float(tensor.double().norm()), 1e-3 * total)
        for name, tensor in reference.items()
    )


def _influence_distance(outcome: Outcome, reference: Outcome) -> float:
    """Largest difference of a token's weight; infinite if other tokens carry loss."""
    if outcome.influence.keys() != reference.influence.keys():
        return math.inf
    return max(abs(outcome.influence[place] - weight) for place, weight in reference.influence.items())


def _moved_distance(weights: dict[str, Tensor], reference: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    assert weights.keys() == reference.keys(), weights.keys() ^ reference.keys()
    difference = sum(float((weights[name] - tensor).double().square().sum()) for name, tensor in reference.items())
    moved = sum(float((start[name] - tensor).double().square().sum()) for name, tensor in reference.items())
    return math.sqrt(difference / moved)
