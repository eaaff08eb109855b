"""What is trained does not depend on the layout: tensor, pipeline, context and data parallelism, packing, recompute.

Every case trains two steps of two updates with the real FIPO loss and is held against transformers in one process
(see `layouts`). Mistakes that such code is prone to are made on purpose at the end, and must be noticed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.actor import policy_head
from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import cp_layout, cp_suffix_sum
from megatron_fipo.parallel.vocab_log_probs import vocab_log_probs
from tests.models import load
from tests.parallel import layouts
from tests.parallel.layouts import Breakage, Case, Outcome, beyond, deviations, layout, metric_differences
from tests.parallel.ranks import run_ranks

P = ParallelSection
TP2_PP2_CP2 = P(tp=2, pp=2, cp=2)

CASES: dict[int, list[Case]] = {
    1: [
        Case("one"),
        Case("one: gradients", "llama", distributed=False, max_tokens=400),
        Case("recompute full", recompute="full", max_tokens=72, distributed=False),
        Case("recompute selective", "llama", recompute="selective", aggregation="sequence_sum"),
        Case("sequence_mean", aggregation="sequence_mean", max_tokens=80),
    ],
    2: [
        Case("tp2", parallel=P(tp=2), distributed=False),
        Case("tp2", "llama", P(tp=2), aggregation="sequence_mean"),
        Case("tp2 sp", parallel=P(tp=2, sequence_parallel=True), distributed=False, recompute="full"),
        Case("tp2 sp", "llama", P(tp=2, sequence_parallel=True), recompute="selective"),
        Case("pp2", parallel=P(pp=2), distributed=False, max_tokens=96),
        Case("pp2", "llama", P(pp=2), aggregation="sequence_sum"),
        Case("cp2", parallel=P(cp=2), distributed=False),
        Case("cp2", "llama", P(cp=2), aggregation="sequence_mean", max_tokens=400),
        Case("dp2", distributed=False, max_tokens=80),
        Case("dp2", "llama", aggregation="sequence_sum"),
        Case("pp2, padded for FP8", "llama", P(pp=2), padded_for="blockwise", max_tokens=400),
    ],
    4: [
        Case("pp2 vpp2", parallel=P(pp=2, virtual_pp=2), distributed=False),
        Case("pp2 vpp2", "llama", P(pp=2, virtual_pp=2), aggregation="sequence_mean", recompute="full"),
        Case("cp4", parallel=P(cp=4), distributed=False),
        Case("cp4", "llama", P(cp=4), aggregation="sequence_sum", max_tokens=400),
        Case("dp2 cp2", parallel=P(cp=2), max_tokens=96),
        Case("dp2 cp2", "llama", P(cp=2), distributed=False, aggregation="sequence_mean"),
        Case("tp2 cp2 sp", parallel=P(tp=2, cp=2, sequence_parallel=True), distributed=False),
        Case("tp4", "llama", P(tp=4), distributed=False),
        Case(
            "tp2 cp2 sp, padded for FP8",
            parallel=P(tp=2, cp=2, sequence_parallel=True),
            distributed=False,
            padded_for="tensorwise",
            max_tokens=256,
        ),
    ],
    8: [
        Case("tp2 pp2 cp2", parallel=TP2_PP2_CP2, distributed=False),
        Case(
            "tp2 pp2 cp2 sp",
            "llama",
            replace(TP2_PP2_CP2, sequence_parallel=True),
            recompute="full",
            aggregation="sequence_mean",
        ),
        Case("pp2 vpp2 cp2 dp2", "llama", P(pp=2, virtual_pp=2, cp=2)),
    ],
}


Folders = dict[int, dict[str, str]]
"""Of the models, by their number of layers and their name."""


def depth(case: Case) -> int:
    """Layers of a case's model. Ranks exchange the same in every layer, so two show all of it; a pipeline has more to
    split: two chunks on a stage, or two layers in one. Beside tensor parallelism a stage has one layer."""
    return 4 if case.parallel.pp > 1 and case.parallel.tp == 1 else 2


def _train(cases: list[Case], folders: Folders) -> list[Outcome] | None:
    outcomes = []
    for case in cases:
        with layout(case.parallel) as ranks:
            outcomes.append(layouts.train_actor(case, folders[depth(case)][case.model], ranks))
    return outcomes if dist.get_rank() == 0 else None


class Runs:
    """Trainings, each done once: the cases of a world size in one launch, a reference for each objective."""

    def __init__(self, folder: Path) -> None:
        self.folders = {count: layouts.save_models(folder / str(count), count) for count in (2, 4)}
        self.outcomes = cache(self._outcomes)
        self.reference = cache(self._reference)
        self.start = cache(self._start)

    def _outcomes(self, world_size: int) -> list[Outcome]:
        cases = list(dict.fromkeys(CASES[world_size]))
        outcomes = dict(zip(cases, run_ranks(_train, world_size, cases, self.folders, timeout_s=240)[0], strict=True))
        return [outcomes[case] for case in CASES[world_size]]

    def _reference(self, model: str, num_layers: int, aggregation: str, num_steps: int) -> Outcome:
        case = Case("reference", model, aggregation=aggregation, num_steps=num_steps)
        return layouts.train_reference(self.folders[num_layers][model], case)

    def _start(self, model: str, num_layers: int) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in load(Path(self.folders[num_layers][model])).named_parameters()}

    def against_reference(self, case: Case, outcome: Outcome) -> dict[str, float]:
        return deviations(outcome, self.reference_of(case), self.start(case.model, depth(case)))

    def reference_of(self, case: Case) -> Outcome:
        return self.reference(case.model, depth(case), case.aggregation, case.num_steps)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("world_size", "index"),
    [
        pytest.param(world, index, id=f"{world} ranks: {case.name} {case.model}")
        for world, cases in CASES.items()
        for index, case in enumerate(cases)
    ],
)
def test_training_is_that_of_one_process(runs: Runs, world_size: int, index: int) -> None:
    case, outcome = CASES[world_size][index], runs.outcomes(world_size)[index]
    assert len(outcome.grad_norms) == 4
    assert bool(outcome.gradients) != case.distributed
    assert beyond(runs.against_reference(case, outcome)) == {}
    assert metric_differences(outcome, runs.reference_of(case)) == {}


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean", "sequence_sum"])
def test_the_training_exercises_what_it_is_to_check(runs: Runs, aggregation: str) -> None:
    """Else all of the above could hold because nothing happened."""
    outcome = runs.reference("llama", 2, aggregation, 2)
    weights = torch.tensor(list(outcome.influence.values()))
    num_response_tokens = sum(
        len(sample.response_ids) for group in layouts.groups_of_step(0)[:2] for sample in group.samples
    )
    assert len(weights) < num_response_tokens, "no response was filtered"
    assert float(weights.min()) < 0.81
    assert float(weights.max()) == pytest.approx(1.2)
    assert int(((weights > 0.81) & (weights < 1.19)).sum()) > 20, "influence weights are all at their bounds"
    assert all(norm > 1 for norm in outcome.grad_norms), "the gradient is not clipped"
    start = runs.start("llama", 2)
    assert min(float((start[name] - w).abs().max()) for name, w in outcome.weights.items()) > 1e-3, (
        "a weight stood still"
    )


# --- mistakes on purpose ---------------------------------------------------------------------------------------------


def _shifted_after_the_split(batch: Any) -> Any:
    return replace(batch, labels=torch.cat([batch.input_ids[1:], batch.input_ids[:1]]))


def _counting_padding(batch: Any) -> Any:
    is_padding = batch.position_ids >= batch.layout.cu_seqlens.diff()[batch.sequence_ids]
    return replace(batch, response_mask=batch.response_mask | is_padding)


def _mean_of_means(loss_of: layouts.LossOfBatch, ranks: Any) -> layouts.LossOfBatch:
    def mean(log_probs: Tensor, entropy: Tensor, batch: Any) -> Any:
        loss = loss_of(log_probs, entropy, batch)
        return replace(
            loss, loss_sum=loss.loss_sum / loss.normalizer.clamp(min=1), normalizer=torch.ones_like(loss.normalizer)
        )

    return mean


def _times_cp_size(loss_of: layouts.LossOfBatch, ranks: Any) -> layouts.LossOfBatch:
    def scaled(log_probs: Tensor, entropy: Tensor, batch: Any) -> Any:
        loss = loss_of(log_probs, entropy, batch)
        return replace(loss, loss_sum=loss.loss_sum * ranks.cp.size())

    return scaled


def _sequences_counted_on_every_rank(loss_of: layouts.LossOfBatch, ranks: Any) -> layouts.LossOfBatch:
    def counted(log_probs: Tensor, entropy: Tensor, batch: Any) -> Any:
        loss = loss_of(log_probs, entropy, batch)
        counts = [torch.zeros_like(loss.normalizer) for _ in range(ranks.cp.size())]
        dist.all_gather(counts, loss.normalizer, group=ranks.cp)
        return replace(loss, normalizer=counts[0])

    return counted


def _without_vocabulary_mask(hidden: Tensor, weight: Tensor, labels: Tensor, **keywords: Any) -> tuple[Tensor, Tensor]:
    rows = len(weight) * keywords["tp_group"].size()
    return vocab_log_probs(hidden, weight, labels, **(keywords | {"vocab_size": rows}))


def _norms_not_marked(actor: Any) -> None:
    for model in actor.models:
        for parameter in model.parameters():
            parameter.sequence_parallel = False


def _own_rank_alone(batch: Any) -> Any:
    return replace(batch, response_mask=batch.response_mask & False) if dist.get_rank() else batch


CP2 = Case("cp2", parallel=P(cp=2), distributed=False, num_steps=1)
DP2 = Case("dp2", distributed=False, num_steps=1, max_tokens=96)
TP2SP = Case("tp2 sp", parallel=P(tp=2, sequence_parallel=True), distributed=False, num_steps=1)

MISTAKES: dict[str, tuple[Case, Breakage, str]] = {
    "nothing, cp2": (CP2, Breakage(), ""),
    "nothing, dp2": (DP2, Breakage(), ""),
    "nothing, tp2 sp": (TP2SP, Breakage(), ""),
    "carry dropped": (
        CP2,
        Breakage(
            during=lambda: mock.patch.object(
                cp_suffix_sum, "carries_into_chunks", lambda heads, *rest: torch.zeros(2 * len(heads), heads.shape[1])
            )
        ),
        "influence",
    ),
    "labels shifted after the split": (CP2, Breakage(batches=_shifted_after_the_split), "gradients"),
    "zigzag not undone in attention": (
        CP2,
        Breakage(
            during=lambda: mock.patch.object(
                cp_layout, "gathered_positions", lambda cu_seqlens_padded, cp_size: torch.arange(cu_seqlens_padded[-1])
            )
        ),
        "gradients",
    ),
    "cp factor twice": (CP2, Breakage(loss=_times_cp_size), "gradient_norm"),
    "padding counted": (CP2, Breakage(batches=_counting_padding), "gradient_norm"),
    "sequences counted on every cp rank": (
        replace(CP2, aggregation="sequence_mean"),
        Breakage(loss=_sequences_counted_on_every_rank),
        "gradient_norm",
    ),
    "mean of means": (DP2, Breakage(loss=_mean_of_means), "gradients"),
    "one rank's part alone": (DP2, Breakage(batches=_own_rank_alone), "gradient_norm"),
    "no vocabulary mask": (
        replace(DP2, parallel=P(tp=2)),
        Breakage(during=lambda: mock.patch.object(policy_head, "vocab_log_probs", _without_vocabulary_mask)),
        "gradients",
    ),
    "norms not marked for sequence parallelism": (TP2SP, Breakage(actor=_norms_not_marked), "gradients"),
}


def _make_mistakes(names: list[str], folders: Folders) -> dict[str, Outcome] | None:
    outcomes = {}
    for name in names:
        case, breakage, _ = MISTAKES[name]
        with layout(case.parallel) as ranks:
            outcomes[name] = layouts.train_actor(case, folders[depth(case)][case.model], ranks, breakage)
    return outcomes if dist.get_rank() == 0 else None


@pytest.fixture(scope="module")
def mistakes(runs: Runs) -> dict[str, Outcome]:
    return run_ranks(_make_mistakes, 2, list(MISTAKES), runs.folders, timeout_s=240)[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(runs: Runs, mistakes: dict[str, Outcome], name: str) -> None:
    case, _, sign = MISTAKES[name]
    found = beyond(runs.against_reference(case, mistakes[name]))
    if not sign:
        assert found == {}
    else:
        assert found.get(sign, 0) > 100, f"{found}: not noticed where it shows"
