"""Gradients summed while backward goes on are those summed behind it, bit for bit; and products that add to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from torch import Tensor, nn

from megatron_fipo.actor import data_parallel
from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.data_parallel import data_parallel_config, fuse_weight_gradients
from megatron_fipo.config import ParallelSection
from tests.parallel import layouts
from tests.parallel.layouts import Case, Outcome, config_of, layout, train_step, whole_weights
from tests.parallel.ranks import run_ranks

P = ParallelSection
BUCKET = 5000
"""Parameters of a bucket, so that the tiny model has several; by default it would have one."""


@dataclass
class Trained:
    """What a training came to, and how its gradients were summed: bucket by bucket, and how many in backward."""

    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    num_buckets: int
    num_started_in_backward: int


@contextmanager
def overlapping(*, with_no_sync: bool = True) -> Iterator[None]:
    """As on GPUs, in small buckets; without no_sync the schedule does not say which microbatch is the last."""

    def in_small_buckets(*arguments: Any) -> Any:
        return replace(data_parallel_config(*arguments), bucket_size=BUCKET)

    real_wrap = data_parallel.wrap_chunks

    def wrap(chunks: Any, *rest: Any) -> Any:
        wrapped = real_wrap(chunks, *rest)
        if not with_no_sync:
            wrapped[0].config.no_sync_func = None
        return wrapped

    with (
        mock.patch.object(data_parallel, "overlaps_gradients", lambda groups: groups.dp_cp.size() > 1),
        mock.patch.object(data_parallel, "data_parallel_config", in_small_buckets),
        mock.patch("megatron_fipo.actor.trained.wrap_chunks", wrap),
    ):
        yield


def _train(case: Case, folder: str) -> Trained:
    config = config_of(case, folder)
    # Clipping would take the norm of shards that are cut otherwise, and so round otherwise.
    config = replace(config, optimizer=replace(config.optimizer, gradient_clip=1e9))
    started: list[int] = []
    real = _ParamAndGradBucketGroup.register_grad_ready

    def noting(group: Any, *arguments: Any) -> None:
        real(group, *arguments)
        started.append(group.grad_reduce_handle is not None)

    with layout(case.parallel) as ranks, mock.patch.object(_ParamAndGradBucketGroup, "register_grad_ready", noting):
        actor, outcome = Actor(config, ranks), Outcome()
        train_step(actor, config, 0, outcome)
        num_buckets = sum(len(chunk.bucket_groups) for chunk in actor._chunks)  # type: ignore[arg-type, misc]
        return Trained(outcome.gradients, whole_weights(actor), num_buckets, sum(started))


def _both(case: Case, folder: str) -> tuple[Trained, Trained]:
    behind = _train(case, folder)
    with overlapping():
        return behind, _train(case, folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return layouts.save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        (Case("dp2 sharded"), 2),
        (Case("dp2 whole", "llama", distributed=False), 2),
        (Case("cp2 sharded", "llama", P(cp=2)), 2),
        (Case("cp2 whole", parallel=P(cp=2), distributed=False, recompute="full"), 2),
        (Case("pp2 vpp2 dp2", "llama", P(pp=2, virtual_pp=2)), 4),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_overlapping_sums_are_those_taken_behind(case: Case, world_size: int, models: dict[str, str]) -> None:
    for behind, overlapped in run_ranks(_both, world_size, case, models[case.model], timeout_s=200):
        assert behind.num_started_in_backward == 0
        assert overlapped.num_started_in_backward > 0, "nothing overlapped, so nothing was tested"
        assert overlapped.num_buckets > behind.num_buckets or case.parallel.pp > 1
        assert overlapped.gradients.keys() == behind.gradients.keys()
        assert bool(behind.gradients) is not case.distributed
        for name, gradient in behind.gradients.items():
            assert torch.equal(overlapped.gradients[name], gradient), name
        for name, weight in behind.weights.items():
            assert torch.equal(overlapped.weights[name], weight), name


def _without_no_sync(case: Case, folder: str) -> bool:
    behind = _train(case, folder)
    with overlapping(with_no_sync=False):
        early = _train(case, folder)
    return all(torch.equal(early.weights[name], weight) for name, weight in behind.weights.items())


def test_a_sum_that_starts_before_the_last_microbatch_is_noticed(models: dict[str, str]) -> None:
    case = Case("dp2 sharded", max_tokens=72)
    assert run_ranks(_without_no_sync, 2, case, models["qwen2"], timeout_s=120) == [False, False]


def _config_alone() -> tuple[bool, bool]:
    with layout(P()) as ranks:
        config = data_parallel_config(config_of(Case("alone"), ""), ranks)
    return config.overlap_grad_reduce, config.overlap_param_gather


def test_on_a_cpu_nothing_overlaps() -> None:
    assert run_ranks(_config_alone, 2, timeout_s=60) == [(False, False)] * 2


def test_products_that_can_add_to_the_gradients_do() -> None:
    chunk = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    chunk[0].fuse_wgrad_accumulation = False  # type: ignore[assignment]
    fuse_weight_gradients([chunk])
    assert chunk[0].fuse_wgrad_accumulation is True
    assert not hasattr(chunk[1], "fuse_wgrad_accumulation"), "no Transformer Engine layer"
