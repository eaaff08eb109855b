"""A microbatch's loss waits for no device: nothing is read from it, and nothing is sent to it.

The loss runs on `pretend_device`, forward and backward, on one rank and on two that share each sequence, and gives the
CPU's numbers bit for bit. What is done wrong on purpose is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import FipoConfig, ParallelSection
from megatron_fipo.metrics import reductions
from megatron_fipo.metrics.reductions import from_plain, merge, to_plain
from megatron_fipo.parallel import cp_suffix_sum
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import shard_batch
from megatron_fipo.parallel.cp_suffix_sum import cp_future_kl
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.rl import future_kl, objective, objective_metrics
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.segments import Segments
from tests import pretend_device
from tests.parallel.loss_cases import BASE, OBJECTIVES, inputs, loss_and_gradients, whole_batch
from tests.parallel.ranks import run_ranks


@dataclass(frozen=True)
class Losses:
    """A microbatch's loss on the pretended device and on the CPU, and what crossed on the way to the first."""

    crossings: list[str]
    there: LossOutput
    values_there: dict[str, Any]
    here: LossOutput
    values_here: dict[str, Any]


class Pretended:
    """One batch on the CPU and the same on the pretended device."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.device = group, pretend_device.register()
        whole = whole_batch(group.size())
        self.on_cpu = inputs(whole, group)
        with pretend_device.watching() as self.sharding:
            local = shard_batch(whole, group, self.device)
        with pretend_device.watching():
            batch, log_probs, entropy = self.on_cpu
            assert batch.old_log_probs is not None
            assert batch.reference_log_probs is not None
            local.old_log_probs = batch.old_log_probs.to(self.device)
            local.reference_log_probs = batch.reference_log_probs.to(self.device)
            self.there = local, log_probs.to(self.device), entropy.to(self.device)

    def crossings(self, config: FipoConfig) -> list[str]:
        """What crosses in a microbatch's loss. Collective."""
        with pretend_device.watching() as crossings:
            loss_and_gradients(*self.there, config, self.group)
        return [str(crossing) for crossing in crossings]

    def losses(self, config: FipoConfig) -> Losses:
        """A microbatch's loss here and there. Collective."""
        with pretend_device.watching() as crossings:
            there = loss_and_gradients(*self.there, config, self.group)
            found = [str(crossing) for crossing in crossings]
        return Losses(found, *there, *loss_and_gradients(*self.on_cpu, config, self.group))

    def differences(self, losses: Losses) -> set[str]:
        """What the device gives otherwise than the CPU, down to the last bit."""
        with pretend_device.watching():
            metrics = pretend_device.on_host(to_plain(losses.there.metrics))
            values = pretend_device.on_host(losses.values_there)
        metrics_here = to_plain(losses.here.metrics)
        found = {name for name, value in values.items() if not same(value, losses.values_here[name])}
        return found | {name for name, value in metrics.items() if not same(value, metrics_here[name])}

    def merging(self, losses: Losses) -> tuple[list[str], list[str], bool]:
        """(what crosses where the metrics of three such microbatches add up, what crosses on their way to other ranks,
        whether they are those of the CPU). Collective."""
        with pretend_device.watching() as crossings:
            merged = merge([losses.there.metrics] * 3)
            adding_up = [str(crossing) for crossing in crossings]
            crossings.clear()
            over_ranks = merge_metrics(merged, self.group)
            leaving = [str(crossing) for crossing in crossings]
        expected = merge_metrics(merge([losses.here.metrics] * 3), self.group)
        return adding_up, leaving, same(to_plain(over_ranks), to_plain(expected))

    def is_added_to_what_was_saved(self, config: FipoConfig) -> bool:
        """Whether metrics out of a checkpoint, on the CPU, and those of the device add up. Collective."""
        with pretend_device.watching():
            there = loss_and_gradients(*self.there, config, self.group)[0].metrics
            saved = from_plain(pretend_device.on_host(to_plain(there)))
            both = merge_metrics(merge([saved, there]), self.group)
        here = loss_and_gradients(*self.on_cpu, config, self.group)[0].metrics
        return same(to_plain(both), to_plain(merge_metrics(merge([here, here]), self.group)))


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(value, theirs[name]) for name, value in ours.items())
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    return bool(ours == theirs)


# --- mistakes on purpose ---------------------------------------------------------------------------------------------


def _reading_a_number(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda shift, *rest: right(shift * float(shift.detach().abs().max().item() > -1), *rest)


def _selecting_by_a_mask(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda values, mask, count: replace(right(values, mask, count), total=values[mask].sum(dtype=torch.float64))


def _not_told_the_size(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda self, values: torch.repeat_interleave(values, self.lengths_on_device)


def _segments_made_in_the_call(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, segments, half_life: right(x, segments.cu, half_life)


def _segments_read_from_the_device(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, segments, half_life: right(x, segments.cu_on_device, half_life)


def _tables_sent_anew(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def power_table(rate: float, count: int, device: torch.device, *dtype: torch.dtype) -> Tensor:
        return right(rate, count, torch.device("cpu"), *dtype).to(device)

    return power_table


MISTAKES: dict[str, tuple[Any, str, Callable[..., Any], set[str]]] = {
    "a number is read": (objective, "clipped_token_loss", _reading_a_number, {"read"}),
    "a mask selects": (objective_metrics, "masked_mean", _selecting_by_a_mask, {"size"}),
    "segments made in the call": (cp_suffix_sum, "segment_suffix_sum", _segments_made_in_the_call, {"to_device"}),
    "segments on the device": (
        cp_suffix_sum,
        "segment_suffix_sum",
        _segments_read_from_the_device,
        {"to_host", "to_device"},
    ),
    "powers sent anew": (future_kl, "power_table", _tables_sent_anew, {"to_device"}),
    "a size is asked for": (Segments, "per_token", _not_told_the_size, {"size"}),
}
"""Where, what instead, and the kinds of crossings that it makes. The last needs context parallelism."""


def _mistaken(pretended: Pretended, name: str) -> set[str]:
    """Kinds of crossings with a mistake made. Collective."""
    owner, attribute, broken, _ = MISTAKES[name]
    with mock.patch.object(owner, attribute, broken(getattr(owner, attribute))):
        return {crossing.split()[0] for crossing in pretended.crossings(BASE)}


def _measure(cp_size: int) -> dict[str, Any]:
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    pretended = Pretended(group)
    losses = {name: pretended.losses(config) for name, config in OBJECTIVES.items()}
    with mock.patch.object(reductions, "_larger", lambda mine, other: max(float(mine), float(other))):
        merged_on_the_host = pretended.merging(losses["fipo"])[0]
    return {
        "sharding": [str(crossing) for crossing in pretended.sharding],
        "crossings": {name: each.crossings for name, each in losses.items()},
        "differences": {name: pretended.differences(each) for name, each in losses.items()},
        "merging": {name: pretended.merging(each) for name, each in losses.items()},
        "merged on the host": merged_on_the_host,
        "adds to what was saved": pretended.is_added_to_what_was_saved(BASE),
        "mistakes": {name: _mistaken(pretended, name) for name in MISTAKES},
    }


@pytest.fixture(scope="module", params=[1, 2], ids=["cp1", "cp2"])
def measured(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank measured."""
    return run_ranks(_measure, request.param, request.param, timeout_s=120)


def test_a_loss_neither_reads_from_its_device_nor_sends_there(measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        assert rank["crossings"] == {name: [] for name in OBJECTIVES}


def test_its_numbers_are_those_of_the_cpu_to_the_last_bit(measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        assert rank["differences"] == {name: set() for name in OBJECTIVES}


def test_a_mistake_is_seen(measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        for name, (*_, kinds) in MISTAKES.items():
            if name != "a size is asked for" or len(measured) > 1:
                assert rank["mistakes"][name] == kinds, name


def test_a_batch_goes_to_its_device_without_being_asked_anything(measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        assert {crossing.split()[0] for crossing in rank["sharding"]} == {"to_device"}


def test_metrics_add_up_on_the_device_and_leave_it_in_three_copies(measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        assert rank["merged on the host"], "metrics read from the device are not noticed"
        for name, (adding_up, leaving, is_same) in rank["merging"].items():
            assert adding_up == [], name
            assert [crossing.split()[0] for crossing in leaving] == ["to_host"] * 3, name  # float32, float64, int64
            assert is_same, name


def test_metrics_out_of_a_checkpoint_add_to_those_of_the_device(measured: list[dict[str, Any]]) -> None:
    assert all(rank["adds to what was saved"] for rank in measured)


def _plain_tensors() -> dict[str, set[str]]:
    """Kinds of crossings of the public function on plain tensors, by where the lengths lie."""
    group, device = parallel_groups.initialize(ParallelSection(), seed=0).cp, pretend_device.register()
    cu_seqlens, found = torch.tensor([0, 40, 50]), {}
    with pretend_device.watching() as crossings:
        x = torch.randn(50).to(device)
        for name, lengths in {"host": cu_seqlens, "device": cu_seqlens.to(device)}.items():
            for function in (
                lambda lengths: cp_future_kl(x, lengths, 32.0, group, x > 0),
                lambda lengths: future_kl.future_kl(x, lengths, 32.0),
            ):
                crossings.clear()
                function(lengths)
                found[name] = found.get(name, set()) | {crossing.kind for crossing in crossings}
    return found


def test_lengths_on_the_host_cost_plain_tensors_no_wait() -> None:
    assert run_ranks(_plain_tensors, 1) == [{"host": {"to_device"}, "device": {"to_device", "to_host"}}]
