"""The optimizer's state in checkpoints: each rank writes a share, what it says belongs to its parameter, and Megatron's
own functions read and write the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_fipo.actor import optimizer_shards
from megatron_fipo.actor.actor import Actor
from megatron_fipo.actor.optimizer import single_optimizers
from megatron_fipo.actor.sharded_state import sharded_state
from megatron_fipo.checkpoint.folder import latest_first
from megatron_fipo.checkpoint.torch_dist import Keeping, begin_checkpoint, load_checkpoint
from megatron_fipo.config import ParallelSection
from tests.parallel import layouts
from tests.parallel.layouts import Case, Outcome, config_of, layout, train_step
from tests.parallel.ranks import run_ranks
from tests.parallel.test_data_parallel import overlapping

P = ParallelSection
LOOP_STATE = {"next_step": 1}
Setting = Callable[[], AbstractContextManager[None]]

SHARED_EMBEDDING = (Case("pp2", parallel=P(pp=2), max_tokens=400), nullcontext)
"""An embedding that two stages share has a bucket of its own. With two layers the one before it is padded."""
SMALL_BUCKETS = (Case("dp2", max_tokens=400), overlapping)
"""As on several GPUs, which sum gradients during backward."""


def _states(actor: Actor) -> dict[str, dict[str, Tensor]]:
    """This rank's shards of main weights and moments, by parameter."""
    names = {id(parameter): name for chunk in actor.models for name, parameter in chunk.named_parameters()}
    return {
        names[id(parameter)]: {
            key: tensor.clone() for key, tensor in optimizer._get_main_param_and_optimizer_states(parameter).items()
        }
        for optimizer in single_optimizers(actor.optimizer)
        for parameter in optimizer.model_param_group_index_map
    }


def _same(left: dict[str, dict[str, Tensor]], right: dict[str, dict[str, Tensor]]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(tensor, right[name][key]) for name, state in left.items() for key, tensor in state.items())


def _has_padding_between(actor: Actor) -> bool:
    buffers = [buffer for optimizer in single_optimizers(actor.optimizer) for buffer in optimizer.buffers]
    return any(
        bucket.offset + bucket.numel_unpadded < following.offset
        for buffer in buffers
        for bucket, following in pairwise(buffer.buckets)
    )


@contextmanager
def by_megatron() -> Iterator[None]:
    """State is saved and loaded by Megatron's own functions."""
    with mock.patch.object(optimizer_shards, "shared_out", return_value=nullcontext()):
        yield


def _save(actor: Actor, folder: Path) -> None:
    begin_checkpoint(actor, folder, 1, LOOP_STATE, Keeping(last=1), asynchronous=False).finish()


def _load(case: Case, model: str, actor: Actor, folder: Path) -> Actor:
    again = Actor(config_of(case, model), actor.ranks)
    load_checkpoint(again, latest_first(folder)[0])
    return again


def _there_and_back(
    case: Case, setting: Setting, other: Case, others_setting: Setting, model: str, folder: str
) -> tuple[bool, list[bool], str]:
    """Save, load in the same layout, load in another, save there, and come back; then save as Megatron does.

    Returns:
        Whether this rank's buffers have padding between buckets, whether states are the same after each way, and what
        loading says of a checkpoint as Megatron writes it.
    """
    with layout(case.parallel) as ranks, setting():
        actor = Actor(config_of(case, model), ranks)
        train_step(actor, config_of(case, model), 0, Outcome())
        saved, has_padding = _states(actor), _has_padding_between(actor)
        _save(actor, Path(folder, "first"))
        same = [_same(_states(_load(case, model, actor, Path(folder, "first"))), saved)]
        with by_megatron():
            _save(actor, Path(folder, "shifted"))
        try:
            _load(case, model, actor, Path(folder, "shifted"))
            message = ""
        except ValueError as error:
            message = str(error)
    with layout(other.parallel) as ranks, others_setting():
        elsewhere = Actor(config_of(other, model), ranks)
        load_checkpoint(elsewhere, latest_first(Path(folder, "first"))[0])
        _save(elsewhere, Path(folder, "second"))
    with layout(case.parallel) as ranks, setting():
        back = Actor(config_of(case, model), ranks)
        load_checkpoint(back, latest_first(Path(folder, "second"))[0])
        same.append(_same(_states(back), saved))
    return has_padding, same, message


@pytest.mark.parametrize(
    ("first", "second"),
    [(SHARED_EMBEDDING, SMALL_BUCKETS), (SMALL_BUCKETS, SHARED_EMBEDDING)],
    ids=["shared embedding", "small buckets"],
)
def test_main_weights_and_moments_stay_with_their_parameter(
    first: tuple[Case, Setting], second: tuple[Case, Setting], tmp_path: Path
) -> None:
    model = layouts.save_models(tmp_path / "models", num_layers=2)["qwen2"]
    outcomes = run_ranks(_there_and_back, 2, *first, *second, model, str(tmp_path), timeout_s=200)
    assert any(has_padding for has_padding, _, _ in outcomes), "nothing is padded, so nothing was tested"
    for _, same, message in outcomes:
        assert same == [True, True]
        assert "the optimizer's main weights differ from the model's weights in" in message
        assert "convert" in message


# --- shares ----------------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What one rank wrote and read, and whether Megatron's own functions agree.

    Attributes:
        num_written, num_read: elements of the rank's sharded tensors of main weights.
        num_all, largest: elements of all parameters of its data-parallel group, and of the largest.
        num_bytes: what it wrote into the checkpoint's folder.
        ours_by_megatron, megatrons_by_us: whether a checkpoint that one wrote is right when the other has read it.
    """

    num_written: int
    num_read: int
    num_all: int
    largest: int
    num_bytes: int
    ours_by_megatron: bool
    megatrons_by_us: bool


def _share(case: Case, model: str, folder: str) -> Shared:
    with layout(case.parallel) as ranks:
        config = config_of(case, model)
        actor = Actor(config, ranks)
        train_step(actor, config, 0, Outcome())
        saved = _states(actor)
        counts = [
            sum(
                tensors["param"].data.numel()
                for tensors in sharded_state(actor.models, actor.optimizer, ranks, is_loading=is_loading)["optimizer"][
                    "param_state"
                ].values()
            )
            for is_loading in (False, True)
        ]
        sizes = [p.numel() for chunk in actor.models for p in chunk.parameters()]
        _save(actor, Path(folder, "ours"))
        files = latest_first(Path(folder, "ours"))[0].glob(f"__{ranks.rank}_*.distcp")
        num_bytes = sum(file.stat().st_size for file in files)
        with by_megatron():
            _save(actor, Path(folder, "megatrons"))
            ours_by_megatron = _same(_states(_load(case, model, actor, Path(folder, "ours"))), saved)
        megatrons_by_us = _same(_states(_load(case, model, actor, Path(folder, "megatrons"))), saved)
        return Shared(*counts, sum(sizes), max(sizes), num_bytes, ours_by_megatron, megatrons_by_us)


@pytest.mark.parametrize(
    ("case", "world_size"),
    [
        (Case("dp4", max_tokens=400), 4),
        (Case("cp2 dp2", parallel=P(cp=2), max_tokens=400), 4),
        (Case("tp2 dp2", parallel=P(tp=2), max_tokens=400), 4),
    ],
    ids=["dp4", "cp2 dp2", "tp2 dp2"],
)
def test_each_rank_writes_and_reads_a_share(case: Case, world_size: int, tmp_path: Path) -> None:
    model = layouts.save_models(tmp_path / "models")["qwen2"]
    shares = run_ranks(_share, world_size, case, model, str(tmp_path), timeout_s=200)
    dp_size = world_size // case.parallel.tp
    for share in shares:
        assert share.num_written <= share.num_all / dp_size + share.largest
        assert share.num_read <= share.num_all / dp_size + 2 * share.largest
        assert share.ours_by_megatron
        assert share.megatrons_by_us
    assert sum(share.num_written > 0 for share in shares) == world_size, "a rank stood by"
    largest_file, all_files = max(share.num_bytes for share in shares), sum(share.num_bytes for share in shares)
    assert largest_file <= 1.5 * all_files / world_size, [share.num_bytes for share in shares]
    if case.parallel.tp == 1:
        assert sum(share.num_written for share in shares) == shares[0].num_all
