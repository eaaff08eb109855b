"""A microbatch's loss waits for no GPU, by torch's own account of what waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from megatron_fipo.config import ParallelSection
from megatron_fipo.parallel import groups as parallel_groups
from megatron_fipo.parallel.batch import shard_batch
from megatron_fipo.parallel.groups import ParallelGroups
from tests.parallel.loss_cases import OBJECTIVES, inputs, loss_and_gradients, whole_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[ParallelGroups]:
    yield parallel_groups.initialize(ParallelSection(), seed=0)
    parallel_groups.shut_down()


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the GPU raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_loss_waits_for_nothing(ranks: ParallelGroups, name: str) -> None:
    device, whole = torch.device("cuda", torch.cuda.current_device()), whole_batch(1)
    batch, log_probs, entropy = inputs(whole, ranks.cp)
    there = shard_batch(whole, ranks.cp, device)
    assert batch.old_log_probs is not None
    assert batch.reference_log_probs is not None
    there.old_log_probs, there.reference_log_probs = (
        batch.old_log_probs.to(device),
        batch.reference_log_probs.to(device),
    )
    log_probs, entropy = log_probs.to(device), entropy.to(device)
    loss_and_gradients(there, log_probs, entropy, OBJECTIVES[name], ranks.cp)  # compiles kernels, makes tables
    with no_waiting():
        loss_and_gradients(there, log_probs, entropy, OBJECTIVES[name], ranks.cp)


def test_waiting_is_noticed(ranks: ParallelGroups) -> None:
    values = torch.ones(8, device="cuda")
    for waits in (values.sum().item, values.nonzero, values.cpu, lambda: values[values > 0]):
        with no_waiting(), pytest.raises(RuntimeError, match="synchroniz"):
            waits()
