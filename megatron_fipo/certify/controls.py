"""Negative controls: deliberate mistakes, one for each claim, that a certificate must notice.

Each is a mistake that a real implementation has made or could make. It is patched in at one named seam, in the rank's
own process, and its results are compared as every layout's are; a control that stays within all bounds means that the
comparison is blind to that mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.parallel import batch, cp_layout, cp_suffix_sum, objective
from megatron_fipo.parallel.objective import Objective
from megatron_fipo.rl.objective import LossOutput
from megatron_fipo.rl.packed_batch import PackedBatch


@dataclass(frozen=True)
class Control:
    """A deliberate mistake.

    Attributes:
        name: shown and given to `applied`.
        mistake: what goes wrong, in a sentence's end.
        layout: where it shows.
        owner, attribute: the seam, a function of this project in its module, or a method in its class.
        broken: makes the wrong function out of the right one.
        needs_future_kl: whether the mistake can only be made with Future-KL.
    """

    name: str
    mistake: str
    layout: str
    owner: ModuleType | type
    attribute: str
    broken: Callable[[Callable[..., Any]], Callable[..., Any]]
    needs_future_kl: bool = False

    @property
    def seam(self) -> str:
        """The patched function's full name."""
        owner = self.owner
        name = owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__name__}"
        return f"{name.removeprefix('megatron_fipo.')}.{self.attribute}"


def _drop_carries(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: torch.zeros_like(right(*args))


def _shift_labels_late(right: Callable[..., PackedBatch]) -> Callable[..., PackedBatch]:
    def wrong(*args: Any) -> PackedBatch:
        local = right(*args)
        return replace(local, labels=local.input_ids.roll(-1))

    return wrong


def _average_means(right: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    def wrong(*args: Any, **kwargs: Any) -> LossOutput:
        loss = right(*args, **kwargs)
        mean = loss.loss_sum / loss.normalizer.clamp(min=1)
        return replace(loss, loss_sum=mean, normalizer=torch.ones_like(loss.normalizer))

    return wrong


def _scale_by_cp(right: Callable[..., LossOutput]) -> Callable[..., LossOutput]:
    def wrong(self: Objective, *args: Any) -> LossOutput:
        loss = right(self, *args)
        return replace(loss, loss_sum=loss.loss_sum * self.cp_group.size())

    return wrong


def _swap_chunks(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Each rank's back chunk before its front chunk, as a gather in rank order leaves them."""

    def wrong(cu_seqlens_padded: Tensor, cp_size: int, cp_rank: int) -> Tensor:
        starts = right(cu_seqlens_padded, cp_size, cp_rank)
        return starts if cp_size == 1 else starts.view(-1, 2).flip(1).flatten()

    return wrong


def _count_padding(right: Callable[..., PackedBatch]) -> Callable[..., PackedBatch]:
    def wrong(*args: Any, **kwargs: Any) -> PackedBatch:
        packed = right(*args, **kwargs)
        mask = packed.response_mask.clone()
        for sequence, length in enumerate(packed.layout.lengths):
            rows = packed.layout.rows_of(sequence)
            mask[rows.start + length : rows.stop] = True
        return replace(packed, response_mask=mask)

    return wrong


CONTROLS = (
    Control(
        "carry-dropped",
        "a chunk's Future-KL leaves out the chunks behind it",
        "cp2",
        cp_suffix_sum,
        "carries_into_chunks",
        _drop_carries,
        needs_future_kl=True,
    ),
    Control(
        "late-label-shift",
        "labels are shifted on each rank, so those at chunk ends come from the wrong chunk",
        "cp2",
        batch,
        "shard_batch",
        _shift_labels_late,
    ),
    Control(
        "mean-of-means",
        "each microbatch is averaged before the average over microbatches",
        "small-microbatches",
        objective,
        "policy_loss",
        _average_means,
    ),
    Control(
        "cp-factor-twice",
        "the loss is multiplied by the context-parallel size though it is summed already",
        "cp2",
        Objective,
        "__call__",
        _scale_by_cp,
    ),
    Control(
        "unsorted-zigzag",
        "a rank takes its two chunks in the wrong order",
        "cp2",
        cp_layout,
        "segment_starts",
        _swap_chunks,
    ),
    Control(
        "padding-counted",
        "padding rows count as response tokens",
        "cp2",
        batch,
        "build_packed_batch",
        _count_padding,
    ),
)


@contextmanager
def applied(name: str | None) -> Iterator[None]:
    """Make the named mistake, in this process, while the context lasts; None makes none."""
    if name is None:
        yield
        return
    control = next(control for control in CONTROLS if control.name == name)
    right = getattr(control.owner, control.attribute)
    setattr(control.owner, control.attribute, control.broken(right))
    try:
        yield
    finally:
        setattr(control.owner, control.attribute, right)
