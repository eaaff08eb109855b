"""Future-KL over context-parallel ranks is the recurrence over whole sequences, within fipo.md's bound.

Every rank holds the rows that a plain reading of Megatron's zigzag layout gives it, computes, and compares its own rows
with the float64 recurrence over the whole. The bound: |error_t| <= 2e-6 * sum over k >= t of gamma^(k-t) |x_k|.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fipo.config import Config, FipoConfig, ParallelSection, ShadowConfig, TrainSection
from megatron_fipo.metrics.reductions import Last, Metrics, scalars
from megatron_fipo.parallel import cp_suffix_sum
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import build_minibatches
from megatron_fipo.parallel.cp_suffix_sum import carries_into_chunks, cp_future_kl, exchanged_bytes
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.metric_merge import merge_metrics
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.parallel.sharded_sequences import ShardedSequences
from megatron_fipo.rl.future_kl import future_kl_reference
from megatron_fipo.rl.packed_batch import PackedBatch
from tests.parallel.ranks import run_ranks
from tests.unit.rl_samples import make_group

ERROR_BOUND = 2e-6


@dataclass(frozen=True)
class Batch:
    """Whole packed sequences, padded for the layout under test."""

    name: str
    x: Tensor
    cu_seqlens: Tensor
    half_life: float
    flags: Tensor

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1


def padded_batch(name: str, sequences: list[Tensor], half_life: float, num_chunks: int, seed: int) -> Batch:
    """Pad each sequence's x with zeros to a multiple of the number of chunks."""
    parts = [torch.cat([x, x.new_zeros(-len(x) % num_chunks)]) for x in sequences]
    x = torch.cat([*parts, torch.zeros(0)])
    generator = torch.Generator().manual_seed(seed)
    flags = torch.rand(len(x), generator=generator) < 0.3
    return Batch(name, x, torch.tensor([0, *itertools.accumulate(map(len, parts))]), half_life, flags)


def batches(cp_size: int) -> Iterator[Batch]:
    """What the layout must get right, from one token to 20,480."""
    num_chunks = 2 * cp_size
    generator = torch.Generator().manual_seed(0)

    def noise(length: int, scale: float = 1.0) -> Tensor:
        return torch.randn(length, generator=generator) * scale

    uneven = [1, 2, 3, 5, num_chunks - 1, num_chunks, num_chunks + 1, 4 * num_chunks, 97, 251, 33 * num_chunks]
    yield padded_batch("uneven", [noise(length) for length in uneven], 32.0, num_chunks, 1)
    yield padded_batch("shorter than the chunks", [noise(1), noise(1), noise(1)], 2.0, num_chunks, 2)
    yield padded_batch("an empty sequence among others", [noise(40), noise(0), noise(7), noise(0)], 8.0, num_chunks, 3)
    yield padded_batch("nothing at all", [], 8.0, num_chunks, 4)
    yield padded_batch("only empty sequences", [noise(0), noise(0)], 8.0, num_chunks, 5)
    yield padded_batch("all masked", [torch.zeros(100), torch.zeros(3)], 32.0, num_chunks, 6)
    for half_life in (0.5, 8.0, 32.0, 256.0):
        yield padded_batch(f"20480 tokens, half-life {half_life}", [noise(20480), noise(333)], half_life, num_chunks, 7)
    # Everything of a sequence's sum comes from its far end, through every chunk on the way.
    last_only = torch.zeros(2048)
    last_only[-1] = 20.0
    first_only = torch.zeros(2048)
    first_only[0] = -20.0
    yield padded_batch("one token at an end", [last_only, first_only], 256.0, num_chunks, 8)
    # Sums that cancel to almost nothing, and magnitudes six orders apart.
    alternating = torch.tensor([20.0, -20.0]).repeat(4096)
    yield padded_batch("alternating", [alternating], 256.0, num_chunks, 9)
    spread = noise(4096) * torch.logspace(-5, 1.3, 4096)
    yield padded_batch("small in front of large", [spread, spread.flip(0)], 64.0, num_chunks, 10)
    yield padded_batch("all at the clamp", [torch.full((20480,), 20.0)], 256.0, num_chunks, 11)


def zigzag_rows(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Megatron's layout in plain words: cut each sequence into 2*cp chunks, take chunk r and chunk 2*cp-1-r."""
    rows: list[int] = []
    for start, end in itertools.pairwise(cu_seqlens.tolist()):
        if cp_size == 1:
            rows += range(start, end)
            continue
        chunk = (end - start) // (2 * cp_size)
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
            rows += range(start + number * chunk, start + (number + 1) * chunk)
    return torch.tensor(rows, dtype=torch.int64)


def check(batch: Batch, group: dist.ProcessGroup) -> None:
    """Assert that this rank's rows are those of the recurrence, and that the filter counts whole sequences."""
    rows = zigzag_rows(batch.cu_seqlens, group.size(), group.rank())
    ours, counts = cp_future_kl(batch.x[rows], batch.cu_seqlens, batch.half_life, group, batch.flags[rows])
    assert ours.dtype == torch.float32
    reference = future_kl_reference(batch.x, batch.cu_seqlens, batch.half_life)[rows]
    scale = future_kl_reference(batch.x.abs(), batch.cu_seqlens, batch.half_life)[rows]
    error = (ours.double() - reference).abs()
    assert bool((error <= ERROR_BOUND * scale).all()), (
        f"{batch.name}: {float((error / scale.clamp(min=1e-30)).max()):.3g} of the sum of absolute values"
    )
    expected = [int(part.sum()) for part in batch.flags.tensor_split(batch.cu_seqlens[1:-1])]
    assert counts.tolist() == expected[: batch.num_sequences], f"{batch.name}: {counts.tolist()} counted"


@contextmanager
def counting_received() -> Iterator[list[int]]:
    """Bytes that this rank receives in each all-gather, noted while it is entered."""
    received: list[int] = []
    gather = dist.all_gather_into_tensor

    def counting(output: Tensor, own: Tensor, **keywords: Any) -> Any:
        received.append(output.numel() * output.element_size())
        return gather(output, own, **keywords)

    with mock.patch.object(dist, "all_gather_into_tensor", counting):
        yield received


def check_exchange(batch: Batch, group: dist.ProcessGroup) -> None:
    """Assert that one all-gather of 12 * cp bytes a sequence is all that crosses ranks, whatever the length."""
    rows = zigzag_rows(batch.cu_seqlens, group.size(), group.rank())
    refused = {name: mock.Mock(side_effect=AssertionError(name)) for name in ("all_reduce", "broadcast", "all_gather")}
    with counting_received() as received, mock.patch.multiple(dist, **refused):
        cp_future_kl(batch.x[rows], batch.cu_seqlens, batch.half_life, group, batch.flags[rows])
    expected = exchanged_bytes(batch.num_sequences, group.size())
    assert received == ([expected] if group.size() > 1 else [])
    assert expected == (12 * group.size() * batch.num_sequences if group.size() > 1 else 0)


def check_is_noticed(breakage: str, batch: Batch, group: dist.ProcessGroup) -> None:
    """Assert that `check` fails on some rank when the exchange is done wrong. Collective."""
    decay = cp_suffix_sum.decay_to_end
    patches: dict[str, Any] = {
        "no carry": mock.patch.object(
            cp_suffix_sum, "carries_into_chunks", lambda heads, *rest: torch.zeros(2 * len(heads), heads.shape[1])
        ),
        "back chunks in rank order": mock.patch.object(torch.Tensor, "flip", lambda self, *dims: self),
        "front and back swapped": mock.patch.object(
            cp_suffix_sum, "carries_into_chunks", lambda heads, *rest: carries_into_chunks(heads.flip(2), *rest)
        ),
        "carry not decayed inside the chunk": mock.patch.object(
            cp_suffix_sum, "decay_to_end", lambda segments, half_life: torch.ones(segments.num_tokens)
        ),
        "end taken as inclusive": mock.patch.object(
            cp_suffix_sum, "decay_to_end", lambda segments, half_life: decay(segments, half_life) * 2 ** (1 / half_life)
        ),
        "bfloat16": mock.patch.object(
            cp_suffix_sum, "carries_into_chunks", lambda *all_: carries_into_chunks(*all_).bfloat16().float()
        ),
        "counts of this rank alone": mock.patch.object(
            cp_suffix_sum, "exchange", mock.Mock(all_gather_tensors=_with_own_counts_only)
        ),
    }
    with patches[breakage]:
        try:
            check(batch, group)
            noticed = False
        except AssertionError:
            noticed = True
    found: list[bool] = [False] * group.size()
    dist.all_gather_object(found, noticed, group=group)
    assert any(found), f"{breakage}: not noticed"


BREAKAGES = (
    "no carry",
    "back chunks in rank order",
    "front and back swapped",
    "carry not decayed inside the chunk",
    "end taken as inclusive",
    "bfloat16",
    "counts of this rank alone",
)


def _with_own_counts_only(own: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    gathered = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(gathered, own, group=group)
    for rank, part in enumerate(gathered):
        if rank != group.rank():
            part[:, 2] = 0
    return gathered


def _all_checks(cp_size: int) -> int:
    group = parallel_groups.initialize(ParallelSection(cp=cp_size), seed=0).cp
    cases = list(batches(cp_size))
    for batch in cases:
        check(batch, group)
        check_exchange(batch, group)
    if cp_size > 1:
        for breakage in BREAKAGES:
            check_is_noticed(breakage, cases[0], group)
        _check_suffix_sum_of_the_loss(cases[0], group)
        _check_several_at_once(cases[0], group)
        _check_layout_errors(group)
    return len(cases)


def _check_suffix_sum_of_the_loss(batch: Batch, group: dist.ProcessGroup) -> None:
    """`ShardedSequences`, whose tables are made before, give what `cp_future_kl` returns."""
    rows = zigzag_rows(batch.cu_seqlens, group.size(), group.rank())
    sequences = ShardedSequences.of(batch.cu_seqlens, group)
    assert torch.equal(sequences.rows, rows)
    values, counts = sequences.suffix_sum(batch.x[rows], batch.flags[rows], batch.half_life)
    expected = cp_future_kl(batch.x[rows], batch.cu_seqlens, batch.half_life, group, batch.flags[rows])
    assert torch.equal(values, expected[0])
    assert torch.equal(counts, expected[1])
    alone = cp_future_kl(batch.x[rows], batch.cu_seqlens, batch.half_life, group)
    assert isinstance(alone, Tensor)
    assert torch.equal(alone, values)


def _check_several_at_once(batch: Batch, group: dist.ProcessGroup) -> None:
    """Several sums are those of one by one, bit for bit, and take one all-gather of 8 * cp bytes a sequence each."""
    rows = zigzag_rows(batch.cu_seqlens, group.size(), group.rank())
    sequences, half_lives = ShardedSequences.of(batch.cu_seqlens, group), (8.0, 32.0, 256.0)
    x = [batch.x[rows], batch.x[rows].square(), batch.x[rows]]
    with counting_received() as received:
        found = sequences.suffix_sums(x, half_lives)
    assert received == [exchanged_bytes(batch.num_sequences, group.size(), future_kl=False, num_shadows=3)]
    assert received == [3 * 8 * group.size() * batch.num_sequences]
    for sums, values, half_life in zip(found, x, half_lives, strict=True):
        assert torch.equal(sums, sequences.suffix_sum(values, batch.flags[rows], half_life)[0])


def _check_layout_errors(group: dist.ProcessGroup) -> None:
    """What does not fit the layout is refused before any communication."""
    num_chunks = 2 * group.size()
    with pytest.raises(ValueError, match=f"divisible by {num_chunks}; sequence 1 has {num_chunks + 1}"):
        cp_future_kl(torch.zeros(4), torch.tensor([0, num_chunks, 2 * num_chunks + 1]), 32.0, group)
    with pytest.raises(ValueError, match="x_local has 5 rows where cu_seqlens_padded gives 2"):
        cp_future_kl(torch.zeros(5), torch.tensor([0, num_chunks]), 32.0, group)


@pytest.mark.parametrize("cp_size", [1, 2, 4, 8])
def test_future_kl_is_the_recurrence_at_any_context_parallel_size(cp_size: int) -> None:
    checked = run_ranks(_all_checks, cp_size, cp_size, timeout_s=120)
    assert checked == [len(list(batches(cp_size)))] * cp_size


def test_carries_are_what_lies_behind_each_chunk() -> None:
    # Two ranks, one sequence of four chunks of one token, half-life 1: heads 8, 4 (front), 1, 2 (back: chunks 3, 2).
    heads = torch.tensor([[[8.0, 1.0]], [[4.0, 2.0]]])
    carries = carries_into_chunks(heads, torch.tensor([1]), 1.0)
    assert carries.flatten().tolist() == [4 + 2 / 2 + 1 / 4, 2 + 1 / 2, 1.0, 0.0]


@pytest.mark.parametrize(("cp_size", "expected"), [(1, 0), (2, 24 * 7), (8, 96 * 7)])
def test_the_exchange_counts_twelve_bytes_for_each_sequence_and_rank(cp_size: int, expected: int) -> None:
    assert exchanged_bytes(7, cp_size) == expected


# --- what a step's metric says of it ---------------------------------------------------------------------------------

EPOCHS = 2
SAMPLES = (60, 15, 15, 15)
"""Response tokens: one data-parallel rank gets the long one, the other the three short ones."""


def _own_and_merged(config: Config, ranks: ParallelGroups) -> tuple[list[list[PackedBatch]], Metrics, float]:
    """(this rank's minibatches, its own part of the metric, what comes of all parts). Collective."""
    group = make_group(0, [0.0] * len(SAMPLES), lengths=SAMPLES)
    minibatches = build_minibatches([group], config, ranks, pad_token_id=0)
    own = cp_suffix_sum.exchange_metrics(minibatches, config, ranks)
    return minibatches, own, scalars(merge_metrics(own, ranks.world))["perf/suffix_sum_exchange_bytes"]


def _received_by_the_loss(minibatches: list[list[PackedBatch]], objective: Objective) -> int:
    """Bytes that this rank receives in the loss of these microbatches, counted at the collective. Collective."""
    with counting_received() as received:
        for batch in itertools.chain(*minibatches):
            batch.old_log_probs = batch.rollout_log_probs
            objective(batch.rollout_log_probs.clone(), torch.zeros_like(batch.rollout_log_probs), batch)
    return sum(received)


def _measure_exchange() -> dict[str, Any]:
    """Of one rank of four, in two layouts."""
    train = TrainSection(num_minibatches=1, num_epochs=EPOCHS)
    found: dict[str, Any] = {}
    for name, parallel in {"dp2 cp2": ParallelSection(cp=2), "pp2 cp2": ParallelSection(cp=2, pp=2)}.items():
        config = replace(Config(), parallel=parallel, train=train)
        ranks = parallel_groups.initialize(parallel, seed=0)
        minibatches, own, merged = _own_and_merged(config, ranks)
        found[name] = own["perf/suffix_sum_exchange_bytes"].value(), merged
        if parallel.pp == 1:
            found["received"] = _received_by_the_loss(minibatches, Objective(config.objective, ranks.cp))
            with mock.patch.object(cp_suffix_sum, "Max", Last), pytest.raises(ValueError, match="should be the same"):
                _own_and_merged(config, ranks)
            dapo = replace(config, objective=FipoConfig(future_kl=False))
            assert cp_suffix_sum.exchange_metrics(minibatches, dapo, ranks) == {}
            for future_kl in (True, False):
                objective = FipoConfig(future_kl=future_kl, shadow={"a": ShadowConfig(8.0), "b": ShadowConfig(128.0)})
                own = cp_suffix_sum.exchange_metrics(minibatches, replace(config, objective=objective), ranks)
                received = _received_by_the_loss(minibatches, Objective(objective, ranks.cp))
                assert own["perf/suffix_sum_exchange_bytes"].value() == received * EPOCHS
        parallel_groups.destroy_model_parallel()
    return found


def test_the_metric_is_what_the_busiest_rank_received() -> None:
    """12 bytes for each of 2 ranks, a sequence and an epoch. As a number that all ranks know alike, it was rank 0's."""
    of_ranks = run_ranks(_measure_exchange, 4, timeout_s=120)
    one, three = 12 * 2 * 1 * EPOCHS, 12 * 2 * 3 * EPOCHS
    assert [found["dp2 cp2"] for found in of_ranks] == [(one, three), (one, three), (three, three), (three, three)]
    assert [found["received"] * EPOCHS for found in of_ranks] == [one, one, three, three]
    # Both stages hold all four sequences, but the first one has no loss.
    four = 12 * 2 * 4 * EPOCHS
    assert [found["pp2 cp2"] for found in of_ranks] == [(0, four), (0, four), (four, four), (four, four)]
