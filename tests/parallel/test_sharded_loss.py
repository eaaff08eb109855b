"""Corrections of the rollout mismatch judge whole sequences, wherever their rows lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import FipoConfig, ParallelSection
from megatron_fipo.metrics.reductions import merge, scalars
from megatron_fipo.parallel import exchange
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import shard_batch
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.parallel.sharded_sequences import ShardedSequences
from megatron_fipo.rl.future_kl import segment_suffix_sum
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.trajectory import Trajectory
from tests.losses import CORRECTIONS, packed_loss
from tests.parallel.loss_cases import SHADOWS
from tests.parallel.ranks import run_ranks

LENGTHS = (5, 33, 64, 97)
NOISE = (0.01, 0.05, 0.05, 0.4)


def whole_batch(cp_size: int) -> PackedBatch:
    """Four responses that the engine scored more and less like the actor. The middle of the third is off in one
    direction and its ends as much in the other, so that it is sound as a whole, but to no context-parallel rank."""
    generator = torch.Generator().manual_seed(0)
    samples = []
    for index, (length, noise) in enumerate(zip(LENGTHS, NOISE, strict=True)):
        difference = noise * torch.randn(length, generator=generator)
        if index == 1:
            difference += 0.15
        if index == 2:
            place = torch.arange(length) * 4 // length
            difference += torch.where((place == 1) | (place == 2), 0.2, -0.2)
        sample = Trajectory.of_response(
            0, index, torch.ones(3).long(), torch.ones(length).long(), difference - 1.0, "stop"
        )
        sample.advantage = 1.0 - index
        samples.append(sample)
    batch = build_packed_batch(samples, range(len(samples)), pad_multiple=2 * cp_size, pad_token_id=0)
    staleness = (torch.arange(len(batch.labels)) % 4 - 1).int()  # unknown, none, one step, two
    return replace(batch, old_log_probs=torch.where(batch.response_mask, -1.0, 0.0), staleness_steps=staleness)


def objective(kind: str, aggregation: str) -> FipoConfig:
    return FipoConfig(
        rollout_correction=kind,
        rollout_ratio_min=0.9,
        rollout_ratio_max=1.1,
        influence_min=0.8,
        loss_aggregation=aggregation,
        sequence_sum_tokens=100,
    )


def compare(config: FipoConfig, group: dist.ProcessGroup, config_here: FipoConfig | None = None) -> set[str]:
    """What of the loss over all ranks, by `config_here` if given, differs from one process's. Collective."""
    batch = whole_batch(group.size())
    log_probs = batch.old_log_probs + 0.1 * torch.sin(torch.arange(len(batch.labels)))
    entropy = torch.zeros_like(log_probs)
    whole = packed_loss(
        batch.cu_seqlens_padded,
        config,
        log_probs=log_probs,
        old_log_probs=batch.old_log_probs,
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        entropy=entropy,
        rollout_log_probs=batch.rollout_log_probs,
        staleness_steps=batch.staleness_steps,
    )
    local = shard_batch(replace(batch, old_log_probs=None), group, torch.device("cpu"))
    rows = shard_batch(replace(batch, rollout_log_probs=torch.arange(len(log_probs))), group, torch.device("cpu"))
    own = rows.rollout_log_probs
    local.old_log_probs = batch.old_log_probs[own]
    part = Objective(config_here or config, group)(log_probs[own], entropy[own], local)
    parts: list[LossOutput] = exchange.all_gather_objects(part, group)
    found = set()
    if not torch.equal(part.final_mask, whole.final_mask[own]):
        found.add("mask")
    if config.future_kl:
        assert part.future_kl is not None
        assert whole.future_kl is not None
        if not torch.allclose(part.future_kl, whole.future_kl[own], rtol=0, atol=2e-5):
            found.add("future_kl")
    if sum(int(each.normalizer) for each in parts) != int(whole.normalizer):
        found.add("normalizer")
    if sum(float(each.loss_sum) for each in parts) != pytest.approx(float(whole.loss_sum), rel=1e-5):
        found.add("loss")
    merged, expected = scalars(merge([each.metrics for each in parts])), scalars(whole.metrics)
    if merged != pytest.approx(expected, rel=1e-4, abs=1e-6, nan_ok=True):
        found.add("metrics")
    return found


def _of_own_chunks_alone(self: ShardedSequences, x: Sequence[Tensor], half_lives: Sequence[float]) -> list[Tensor]:
    return [segment_suffix_sum(each, self.segments, half_life) for each, half_life in zip(x, half_lives, strict=True)]


def _check(cp_size: int) -> dict[str, set[str]]:
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    results = {
        f"{kind}, {aggregation}": compare(objective(kind, aggregation), group)
        for kind in CORRECTIONS
        for aggregation in ("token_mean", "sequence_mean", "sequence_sum")
    }
    proximal = objective("token_truncated", "token_mean")
    behaviour = replace(proximal, future_kl_reference="behaviour")
    results["behaviour in Future-KL"] = compare(behaviour, group)
    results["proximal for behaviour"] = compare(behaviour, group, config_here=proximal)
    shadowed = {"fipo": replace(proximal, shadow=SHADOWS), "behaviour": replace(behaviour, shadow=SHADOWS)}
    for name, config in {**shadowed, "dapo": replace(shadowed["fipo"], future_kl=False)}.items():
        results[f"shadows of {name}"] = compare(config, group)
    with mock.patch.object(ShardedSequences, "suffix_sums", _of_own_chunks_alone):
        results["shadows of own chunks"] = compare(shadowed["fipo"], group)
    swapped = {"own": SHADOWS["tau_8"], "tau_8": SHADOWS["own"]}
    results["shadows of others"] = compare(
        replace(proximal, shadow={**SHADOWS, **swapped}), group, config_here=shadowed["fipo"]
    )
    with mock.patch.object(ShardedSequences, "total", lambda self, per_sequence: per_sequence):
        for kind in ("sequence_masked", "geometric_masked"):
            results[f"own rows only, {kind}"] = compare(objective(kind, "token_mean"), group)
    return results


@pytest.mark.parametrize("cp_size", [2, 4])
def test_corrections_are_those_of_one_process(cp_size: int) -> None:
    ranks = run_ranks(_check, cp_size, cp_size, timeout_s=120)
    for name in ranks[0]:
        found = set().union(*(results[name] for results in ranks))
        if name.startswith("own rows only"):
            assert "loss" in found, f"{name}: not noticed"
        elif name == "proximal for behaviour":
            assert {"loss", "future_kl", "metrics"} <= found, f"{name}: not noticed"
        elif name in ("shadows of own chunks", "shadows of others"):
            assert found == {"metrics"}, f"{name}: not noticed, or not in the metrics alone"
        else:
            assert found == set(), name


def test_the_batch_puts_every_correction_to_work() -> None:
    batch = whole_batch(2)
    for kind in ("sequence_masked", "geometric_masked", "token_masked"):
        output = packed_loss(
            batch.cu_seqlens_padded,
            objective(kind, "token_mean"),
            log_probs=batch.old_log_probs,
            old_log_probs=batch.old_log_probs,
            advantages=batch.advantages,
            response_mask=batch.response_mask,
            rollout_log_probs=batch.rollout_log_probs,
        )
        assert 0 < int(output.normalizer) < int(batch.response_mask.sum()), kind
