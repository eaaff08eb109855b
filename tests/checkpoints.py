"""What checkpoints on disk hold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_fipo.convert.torch_dist import TorchDistReader


def contents(checkpoint: Path) -> dict[str, Tensor]:
    """All weights and the optimizer's whole state of a checkpoint, by name, in whatever layout it was saved."""
    reader = TorchDistReader(checkpoint)
    common = dist_checkpointing.load_common_state_dict(str(checkpoint))
    counts = dict(_update_counts(common["optimizer"], "optimizer.common"))
    assert counts, "Adam counts its updates"
    return {key: reader.read(key) for key in reader.keys} | counts


def _update_counts(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's counts of updates, which are among what is no sharded tensor, by their places."""
    if isinstance(value, (dict, list)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _update_counts(part, f"{name}.{key}")
    elif name.endswith(("step", "common_step")):
        yield name, torch.as_tensor(value)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not bit for bit the same."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
