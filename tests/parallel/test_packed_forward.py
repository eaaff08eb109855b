"""How packed sequences are described to Megatron: without asking a device, and so that positions stay each sequence's.

The real actor's forward and backward run on `pretend_device`, where what the host reads is written down, and on the
CPU, where the longest length that Megatron is told must change no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import transformer_block, transformer_layer
from torch import Tensor, nn

from megatron_fipo.actor import model as actor_model
from megatron_fipo.actor import schedule
from megatron_fipo.actor.actor import Actor
from megatron_fipo.config import Config, ParallelSection
from megatron_fipo.parallel import batch as batches
from megatron_fipo.parallel import cp_layout
from megatron_fipo.parallel.groups import ParallelGroups
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.packed_batch import PackedBatch
from megatron_fipo.rl.packing import build_packed_batch
from megatron_fipo.rl.trajectory import Trajectory
from tests import pretend_device
from tests.parallel.layouts import PAD_TOKEN, Case, config_of, groups_of_step, layout, save_models
from tests.parallel.ranks import run_ranks

RIGHT_PARAMS, ROUNDED = actor_model.packed_sequence_params, actor_model._rounded_longest
OF_ATTENTION = ("/cp_attention.py:",)
"""Attention without Transformer Engine selects by masks when it makes a microbatch's layout."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_models(tmp_path_factory.mktemp("models"))["qwen2"]


# --- what the host reads ---------------------------------------------------------------------------------------------


def _move(model: nn.Module, device: torch.device) -> None:
    """All tensors of a model to the pretended device, which `Module.to` cannot do to a tensor subclass."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.detach().to(device)))
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor):
                setattr(module, name, value.to(device))


@contextmanager
def _on_pretended_device(actor: Actor) -> Iterator[tuple[torch.device, list[pretend_device.Crossing]]]:
    """The actor's model there, without its optimizer."""
    device, model = pretend_device.register(), actor.models[0]
    RotaryEmbedding.forward.cache_clear()  # of angles on the CPU
    model.config.finalize_model_grads_func = None  # it wants Megatron's data-parallel wrapper
    as_they_are = mock.Mock(side_effect=lambda inp, **keywords: inp)  # Megatron exchanges the data of its outputs
    with (
        mock.patch.object(transformer_block, "make_viewless_tensor", as_they_are),
        mock.patch.object(transformer_layer, "make_viewless_tensor", as_they_are),
        mock.patch.object(batches, "device", return_value=device),
        pretend_device.watching() as crossings,
    ):
        _move(model, device)
        actor._chunks = [model]
        yield device, crossings


def _reading_params(cu_seqlens_padded: Tensor, cu_seqlens_on_host: Tensor) -> PackedSeqParams:
    params = RIGHT_PARAMS(cu_seqlens_padded, cu_seqlens_on_host)
    params.max_seqlen_q = params.max_seqlen_kv = int(cu_seqlens_padded.diff().max())
    return params


def _crossings(folder: str, cp_size: int) -> dict[str, list[str]]:
    """What an actor's log-probs and an update's forward and backward read, attention aside. Collective."""
    case = Case("", parallel=ParallelSection(cp=cp_size), distributed=False)
    found: dict[str, list[str]] = {}
    with layout(case.parallel) as ranks:
        config = config_of(case, folder)
        actor = Actor(config, ranks)
        with _on_pretended_device(actor) as (_, crossings):
            microbatches = batches.build_minibatches(groups_of_step(0), config, ranks, PAD_TOKEN)[0]
            for name, params in (("right", RIGHT_PARAMS), ("reading", _reading_params)):
                with mock.patch.object(schedule, "packed_sequence_params", params):
                    crossings.clear()
                    _forward_and_backward(actor, config, ranks, microbatches)
                others = {str(crossing) for crossing in crossings if crossing.kind != "to_device"}
                found[name] = sorted(other for other in others if not any(part in other for part in OF_ATTENTION))
        assert all(parameter.grad is not None for parameter in actor.models[0].parameters())
    return found


def _forward_and_backward(
    actor: Actor, config: Config, ranks: ParallelGroups, microbatches: Sequence[PackedBatch]
) -> None:
    assert len(microbatches) > 1
    for batch, log_probs in zip(microbatches, actor.log_probs(microbatches), strict=True):
        batch.old_log_probs = log_probs - batch.rollout_log_probs
    actor._forward_and_backward(microbatches, Objective(config.objective, ranks.cp))


@pytest.mark.parametrize("cp_size", [1, 2])
def test_forward_and_backward_read_nothing_from_the_device(folder: str, cp_size: int) -> None:
    for found in run_ranks(_crossings, cp_size, folder, cp_size, timeout_s=120):
        assert found["right"] == []
        assert any("test_packed_forward" in crossing for crossing in found["reading"]), "a read is not noticed"


# --- the longest length that Megatron is told ------------------------------------------------------------------------


def _samples(lengths: Sequence[int]) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(0)
    return [
        Trajectory.of_response(
            prompt_id=0,
            sample_index=index,
            prompt_ids=torch.tensor([2]),
            response_ids=torch.randint(2, 20, (length - 1,), generator=generator),
            rollout_log_probs=torch.zeros(length - 1),
            finish_reason="stop",
        )
        for index, length in enumerate(lengths)
    ]


def _log_probs(
    actor: Actor, lengths: Sequence[int], longest: Callable[[Tensor], int], *, row_as_position: bool = False
) -> Tensor:
    """The actor's log-probs of packed sequences, Megatron being told what `longest` says. Collective."""
    samples, cp_group = _samples(lengths), actor.ranks.cp
    whole = build_packed_batch(samples, range(len(samples)), 2 * cp_group.size(), PAD_TOKEN)
    batch = batches.shard_batch(whole, cp_group, torch.device("cpu"))
    if row_as_position:
        batch.position_ids = cp_layout.local_indices(batch.layout.cu_seqlens_padded, cp_group.size(), cp_group.rank())
    with mock.patch.object(actor_model, "_rounded_longest", longest):
        return actor.log_probs([batch])[0].clone()


def _exactly(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens.diff().max())


def _all_tokens(cu_seqlens: Tensor) -> int:
    return int(cu_seqlens[-1])


def _compare_lengths(folder: str, cp_size: int) -> dict[str, tuple[bool, bool, bool]]:
    """For batches by name: whether the bits are those of the exact length with the rounded one, with the number of all
    tokens in its place, and with positions counted through the batch. Collective."""
    found, case = {}, Case("", parallel=ParallelSection(cp=cp_size), distributed=False)
    with layout(case.parallel) as ranks:
        actor = Actor(config_of(case, folder), ranks)
        for name, lengths in {
            "1,024 tokens of three sequences": (500, 400, 124),
            "2,048 tokens, one of them long": (1500, 548),
            "another number of tokens": (500, 37),
            "one sequence of 1,024": (1024,),
            "one sequence": (700,),
        }.items():
            rounded, exact, all_tokens = (
                _log_probs(actor, lengths, longest) for longest in (ROUNDED, _exactly, _all_tokens)
            )
            through = _log_probs(actor, lengths, _all_tokens, row_as_position=True)
            found[name] = torch.equal(rounded, exact), torch.equal(all_tokens, exact), torch.equal(through, exact)
    return found


@pytest.mark.parametrize("cp_size", [1, 2])
def test_the_rounded_length_changes_no_bit(folder: str, cp_size: int) -> None:
    for found in run_ranks(_compare_lengths, cp_size, folder, cp_size, timeout_s=120):
        for name, (is_same, is_same_for_all_tokens, is_same_by_row) in found.items():
            assert is_same, name
            assert is_same_for_all_tokens, (
                f"{name}: as many angles as the batch has tokens were taken for its positions"
            )
            assert is_same_by_row == name.startswith("one"), f"{name}: positions of the whole batch are not noticed"


def _angles_computed(folder: str) -> dict[str, int]:
    """How often rotary angles are computed for four microbatches whose longest lengths differ."""
    found, case = {}, Case("", distributed=False)
    with layout(case.parallel) as ranks:
        actor = Actor(config_of(case, folder), ranks)
        for name, longest in {"rounded": ROUNDED, "exact": _exactly}.items():
            RotaryEmbedding.forward.cache_clear()
            for lengths in ((500, 37), (510, 41), (700, 3), (333, 20)):
                _log_probs(actor, lengths, longest)
            found[name] = RotaryEmbedding.forward.cache_info().misses
    return found


def test_microbatches_share_their_rotary_angles(folder: str) -> None:
    assert run_ranks(_angles_computed, 1, folder) == [{"rounded": 1, "exact": 4}]
